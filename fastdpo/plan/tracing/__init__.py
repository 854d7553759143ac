"""A training step on tensors without values: what it allocates, and how long each of it lives."""
