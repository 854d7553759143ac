"""The head of `fastdpo.head.impl.triton`, with the warp-specialised forward where that serves the call.

`auto` times it beside the others only with FASTDPO_GLUON=1 in the environment; the forward's module says why.
"""

from functools import partial

from fastdpo.head.impl import triton
from fastdpo.head.impl.triton import backward, cell_columns, kept_like
from fastdpo.kernels.linear_logprobs_forward_gluon import linear_logprobs_forward_gluon

__all__ = ["backward", "cell_columns", "forward", "kept_like"]

forward = partial(triton.forward, launch=linear_logprobs_forward_gluon)
