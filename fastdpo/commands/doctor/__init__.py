"""`fastdpo doctor`: what this machine has, and what fastdpo does on it."""
