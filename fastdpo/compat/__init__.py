"""Compatibility with TRL and Liger: no other modules know of them."""
