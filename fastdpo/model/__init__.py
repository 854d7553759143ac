"""Run any causal language model on packed batches, or refuse it with a reason."""
