"""From dataset rows to packed batches of token ids."""
