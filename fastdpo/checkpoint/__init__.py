"""Checkpoints that are complete or not there, say what they belong to, and survive kills, damage and preemption."""
