"""The algorithm of the op, once per backend: each module has `forward` and `backward`, with one signature."""
