"""Turn token log-probabilities into the loss of an optimizer step."""
