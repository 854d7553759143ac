"""Files that a stranger may have written: they are bounded and checked before anything believes them."""
