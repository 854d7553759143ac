"""From token log-probabilities to the loss of an optimizer step."""
