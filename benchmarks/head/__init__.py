"""The head alone, beside its peers: the cases, their inputs and their float64 truth, and the comparison."""
