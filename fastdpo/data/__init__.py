"""Turn dataset rows into packed batches of token ids."""
