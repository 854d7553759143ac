"""Images in prompts: how a row holds them, and what a batch gives the model of them."""
