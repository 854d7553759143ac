"""Compute attention over packed batches."""
