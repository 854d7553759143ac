"""Commands that take no config file: what does this machine do, and what is deployed after training?"""
