"""The tokens and the memory of a run, counted and computed before it starts."""
