"""Find the reference, compute and cache its log-probs, and let it follow the policy."""
