"""Running any causal language model on packed batches, or refusing it."""
