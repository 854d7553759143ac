"""Run `linear_logprobs_forward` on chips that copy tiles by descriptor: NVIDIA's from compute capability 9.0 on.

The maths, the results and the epilogue are those of the pointer kernel in `linear_logprobs_forward`. This kernel
differs in two points:

* The tensor memory accelerator (TMA) copies tiles of hidden and weight to shared memory: no thread computes an address
  or holds a pointer, and the accelerator fills in zeros past the edges of N, V and D.
* The grid has one program per multiprocessor. Each walks a list of (row block, share of the vocabulary) pairs in the
  grouped order in which the pointer kernel's programs start.

TMA needs 16-byte alignment: `fits_tma` says which inputs have it. The launcher in `linear_logprobs_forward` chooses
the kernel.

Shapes: N rows, D hidden size, V vocabulary, R rank of the low-rank addition, S shares.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo.kernels.logits_tile import Config, Configs, add_bias, add_low_rank, grouped_program_ids
from fastdpo.kernels.online_logsumexp import empty_state, fold_tile, load_targets, store_state

# tests/kernels/test_aot.py compiles these and checks that they spill no register
IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
STAGES = 4 if IS_OLD else 3  # Triton 3.9 spills registers at 4
TMA_CONFIGS: Configs = {
    ((9, 0), 2): Config(128, 256, 64, 8, STAGES),
    ((10, 0), 2): Config(128, 128, 64, 8, 3),
}
TMA_TWO_TILE_CONFIGS: Configs = {
    ((9, 0), 2): Config(128, 128, 64, 8, 3),
    ((10, 0), 2): Config(64, 128, 64, 8, 2),
}


# For a forward that keeps probabilities; Triton 3.6 spills registers at a width of 256
TMA_KEEPING_CONFIGS: Configs = TMA_CONFIGS | {((9, 0), 2): Config(128, 128 if IS_OLD else 256, 64, 8, 3)}


@triton.jit(do_not_specialize=["N", "V", "S", "stride_fj"])  # they change from batch to batch: compile once for all
def linear_logprobs_forward_tma_kernel(
    partials_ptr,  # [S, 3 or 7, N] ACC, out
    masses_ptr,  # [J, N] float32, out, or None
    probs_desc,  # [N, C], in blocks of [BLOCK_N, BLOCK_V], out, or None; see `kept_probs.store_probs`
    factors_ptr,
    hidden_desc,  # [N, D], in blocks of [BLOCK_N, BLOCK_D]
    weight_desc,  # [V, D], in blocks of [BLOCK_V, BLOCK_D]
    bias_ptr,  # [V], or None
    hidden2_ptr,  # [N, R], or None
    weight2_ptr,  # [V, R]
    targets_ptr,  # [N] int64
    N,
    V,
    D,
    R,
    S,
    first,
    C,
    stride_fj,
    scale: tl.float64,  # without the annotation, a Python float is rounded to float32
    c: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the partial results; `linear_logprobs_forward` launches this kernel."""
    row_blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(V, BLOCK_V)
    scale = tl.full((), scale, ACC)
    c = tl.full((), c, ACC)
    for pair in range(tl.program_id(0), row_blocks * S, tl.num_programs(0)):
        pid_n, pid_s = grouped_program_ids(pair, row_blocks, S, GROUP_N)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        targets = load_targets(targets_ptr, offs_n, N, V)

        state = empty_state(HAS_STATS, ACC, BLOCK_N)
        for tile in range(pid_s * tiles // S, (pid_s + 1) * tiles // S):
            z = tl.zeros((BLOCK_N, BLOCK_V), ACC)
            for d_start in range(0, D, BLOCK_D):
                h = hidden_desc.load([pid_n * BLOCK_N, d_start])
                w = weight_desc.load([tile * BLOCK_V, d_start])
                if UPCAST:
                    h = h.to(ACC)
                    w = w.to(ACC)
                z = tl.dot(h, w.T, z, input_precision="ieee", out_dtype=ACC)
            offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            z = add_bias(z, bias_ptr, offs_v, V)
            z = add_low_rank(z, hidden2_ptr, weight2_ptr, offs_n, offs_v, N, V, R, ACC, UPCAST, BLOCK_D)
            state = fold_tile(
                state, z, masses_ptr, probs_desc, factors_ptr, pid_n * BLOCK_N, first, C, stride_fj, targets, offs_n,
                tile * BLOCK_V, N, V, scale, c, HAS_SOFTCAP, IS_NEGATIVE, True, HAS_STATS, TILE,
                BLOCK_N, BLOCK_V,
            )  # fmt: skip
        store_state(partials_ptr, state, offs_n, pid_s, N, HAS_STATS)


def aligned(x: Tensor) -> bool:
    """Whether the elements of `x` have 16 bits, and its rows are contiguous and 16-byte aligned."""
    return (
        x.element_size() == 2
        and x.numel() > 0
        and x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )


def fits_tma(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the chip and the inputs allow this kernel."""
    if not hidden.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(hidden.device) < (9, 0):
        return False
    return aligned(hidden) and aligned(weight)


def descriptors(hidden: Tensor, weight: Tensor, config: Config) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Make the TMA descriptors of `hidden` and `weight`, in the blocks of `config`."""
    return (
        TensorDescriptor.from_tensor(hidden, [config.BLOCK_N, config.BLOCK_D]),
        TensorDescriptor.from_tensor(weight, [config.BLOCK_V, config.BLOCK_D]),
    )
