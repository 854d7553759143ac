"""The fused LM head: log-probabilities of tokens without the logits."""
