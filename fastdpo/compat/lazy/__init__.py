"""Logits that a model's head promises and that are hardly ever computed."""
