"""Run `linear_logprobs_forward` on Hopper with a producer warp and two consumer warpgroups, written in Gluon.

The maths and the results are those of `linear_logprobs_forward`, the walk over (row block, share of the vocabulary)
pairs is that of `linear_logprobs_forward_tma`. There, no matmul runs while a program folds a tile into its log-sum-exp.
Here a program has three partitions:

* The producer, one warp with 24 registers, copies blocks of hidden and weight into a ring of STAGES slots of shared
  memory with the tensor memory accelerator (TMA), which fills in zeros past the edges of N, V and D.
* Two consumers, a warpgroup with 240 registers each, take one half of the rows of every block, multiply it, and fold
  the tile. While one folds, the tensor cores work for the other one, and the ring fills up.

A slot has two barriers. `full` completes a phase when the bytes of a copy have arrived, `empty` when both consumers
have read them. Use number k of a slot waits for phase k of `full`, and is filled after phase k - 1 of `empty`. A
barrier holds only the parity of its phase, which is enough: neither side can be two phases ahead of the other.

The kernel serves 16-bit inputs that TMA can read, with any scale, a soft-cap and tile masses. For a bias, a low-rank
addition or statistics, its launcher calls `linear_logprobs_forward`.

This kernel has not run on a GPU yet. A mistake in its barriers would raise no error: the kernel would never end, and
the process could not end it either. So `impl="auto"` tries it only with FASTDPO_GLUON=1 in the environment, and
`benchmarks/studies/gluon_forward.py` runs it under a time limit. Its source is executed without a GPU by
`tests/helpers/warp_simulator.py`, with copies and matmuls that end late and in any order, because Triton's interpreter
can't run Gluon.

Shapes: N rows, D hidden size, V vocabulary, S shares, J tiles of TILE tokens.
"""

from typing import Any

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastdpo.kernels.linear_logprobs_forward import ForwardOutput, default_splits, linear_logprobs_forward
from fastdpo.kernels.linear_logprobs_forward_tma import fits_tma
from fastdpo.kernels.logits_tile import GROUP_N, Config, grouped_program_ids, processors, tanh_and_slope
from fastdpo.kernels.online_logsumexp import exponent, load_targets, merge
from fastdpo.kernels.row_lists import TILE

# Triton 3.8 gave the copy a new name
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# tests/kernels/test_gluon_aot.py checks that these spill no register. num_warps counts those of one consumer
CONFIG = Config(128, 256, 64, 4, 4)
SOFTCAPPED_MASSES_CONFIG = Config(128, 128, 64, 4, 6)  # the slopes of a tile take as many registers as the tile
CONSUMER_REGISTERS = 240
PRODUCER_REGISTERS = 24


@gluon.jit
def _produce(
    hidden_desc,
    weight_desc,
    hidden_ring,  # [STAGES, BLOCK_N, BLOCK_D] in shared memory
    weight_ring,  # [STAGES, BLOCK_V, BLOCK_D]
    full,  # [STAGES] barriers
    empty,
    row_blocks,
    tiles,
    D,
    S,
    GROUP_N: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy all blocks that the consumers will ask for, in their order."""
    step = 0
    for pair in range(gl.program_id(0), row_blocks * S, gl.num_programs(0)):
        pid_n, pid_s = grouped_program_ids(pair, row_blocks, S, GROUP_N)
        for tile in range(pid_s * tiles // S, (pid_s + 1) * tiles // S):
            for d_start in range(0, D, BLOCK_D):
                slot = step % STAGES
                # A slot is empty before its first use: the phase before the first one counts as complete
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(slot), hidden_desc.block_type.nbytes + weight_desc.block_type.nbytes)
                async_load(hidden_desc, [pid_n * BLOCK_N, d_start], full.index(slot), hidden_ring.index(slot))
                async_load(weight_desc, [tile * BLOCK_V, d_start], full.index(slot), weight_ring.index(slot))
                step += 1


@gluon.jit
def _fold_tile(
    m,  # [ROWS], the state of `online_logsumexp`
    s,
    t,
    z,  # [ROWS, BLOCK_V], the raw logits of the tile
    masses_ptr,  # [J, N] float32, out, or None
    targets,  # [ROWS]
    offs_n,  # [ROWS]
    v_start,
    N,
    V,
    scale,
    c,
    HAS_SOFTCAP: gl.constexpr,
    IS_NEGATIVE: gl.constexpr,
    TILE: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_V: gl.constexpr,
    ROW_LAYOUT: gl.constexpr,
    COLUMN_LAYOUT: gl.constexpr,
):
    """Do what `online_logsumexp.fold_tile` does, with Gluon's layouts, for half of the rows of a block."""
    u = z
    if HAS_SOFTCAP:
        u, slope = tanh_and_slope(scale * z)
    elif IS_NEGATIVE:
        u = -z
    # Few tiles hold a target or the end of the vocabulary; the others skip the comparisons
    holds_target = gl.max(((targets >= v_start) & (targets < v_start + BLOCK_V)).to(gl.int32), axis=0) > 0
    if holds_target | (v_start + BLOCK_V > V):
        offs_v = v_start + gl.arange(0, BLOCK_V, layout=COLUMN_LAYOUT)
        is_target = offs_v[None, :] == targets[:, None]
        t += gl.sum(gl.where(is_target, u, 0.0), axis=1)
        u = gl.where((offs_v < V)[None, :] & (offs_v[None, :] != targets[:, None]), u, float("-inf"))

    m_new = gl.maximum(m, gl.max(u, axis=1))
    shift = c * gl.where(m_new == float("-inf"), 0.0, m_new)  # avoids -inf - -inf
    e = gl.exp2(c * u - shift[:, None])
    rescale = gl.exp2(c * m - shift)

    if masses_ptr is None:
        s = rescale * s + gl.sum(e, axis=1)
    else:
        TILES: gl.constexpr = BLOCK_V // TILE
        if HAS_SOFTCAP:
            s = rescale * s + gl.sum(e, axis=1)
            e *= slope
        # int64, because J * N passes 2^31 at V=262144 from 2^20 rows on
        masses_ptrs = masses_ptr + (v_start // TILE).to(gl.int64) * N + offs_n
        mask_n = offs_n < N
        if TILES == 1:
            left = gl.sum(e, axis=1)
            total = left
        else:
            left, right = gl.split(gl.sum(gl.reshape(e, [ROWS, TILES, TILE]), axis=2))
            left = gl.convert_layout(left, ROW_LAYOUT)
            right = gl.convert_layout(right, ROW_LAYOUT)
            total = left + right
            gl.store(masses_ptrs + N, _log_mass(right, shift), mask=mask_n & (v_start + TILE < V))
        gl.store(masses_ptrs, _log_mass(left, shift), mask=mask_n)
        if not HAS_SOFTCAP:
            s = rescale * s + total
    return m_new, s, t


@gluon.jit
def _log_mass(total, shift):
    """Return the natural logarithm of total * 2^shift, -inf for a total of 0."""
    LN2: gl.constexpr = 0.6931471805599453
    return (shift + gl.log2(total)) * LN2


@gluon.jit
def _consume(
    HALF: gl.constexpr,  # 0 or 1: the upper or lower half of the rows of each block
    partials_ptr,
    masses_ptr,
    targets_ptr,
    hidden_ring,
    weight_ring,
    full,
    empty,
    N,
    V,
    row_blocks,
    tiles,
    D,
    S,
    scale,
    c,
    HAS_SOFTCAP: gl.constexpr,
    IS_NEGATIVE: gl.constexpr,
    TILE: gl.constexpr,
    GROUP_N: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiply and fold the tiles of one half of the rows, and store their partial results."""
    ROWS: gl.constexpr = BLOCK_N // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_V, 16])
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    COLUMN_LAYOUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    step = 0
    for pair in range(gl.program_id(0), row_blocks * S, gl.num_programs(0)):
        pid_n, pid_s = grouped_program_ids(pair, row_blocks, S, GROUP_N)
        offs_n = pid_n * BLOCK_N + HALF * ROWS + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        targets = load_targets(targets_ptr, offs_n, N, V)
        m = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW_LAYOUT)
        s = gl.full([ROWS], 0.0, gl.float32, layout=ROW_LAYOUT)
        t = gl.full([ROWS], 0.0, gl.float32, layout=ROW_LAYOUT)
        for tile in range(pid_s * tiles // S, (pid_s + 1) * tiles // S):
            z = gl.full([ROWS, BLOCK_V], 0.0, gl.float32, layout=LAYOUT)
            for d_start in range(0, D, BLOCK_D):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                h = hidden_ring.index(slot).slice(HALF * ROWS, ROWS, dim=0)
                w = weight_ring.index(slot).permute((1, 0))
                z = warpgroup_mma(h, w, z, use_acc=d_start > 0, is_async=True)
                # One matmul stays in flight, so it is the slot of the one before that has been read
                z = warpgroup_mma_wait(1, deps=[z])
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=d_start > 0)
                step += 1
            z = warpgroup_mma_wait(0, deps=[z])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
            m, s, t = _fold_tile(
                m, s, t, z, masses_ptr, targets, offs_n, tile * BLOCK_V, N, V, scale, c,
                HAS_SOFTCAP, IS_NEGATIVE, TILE, ROWS, BLOCK_V, ROW_LAYOUT, COLUMN_LAYOUT,
            )  # fmt: skip
        mask_n = offs_n < N
        partials_ptrs = partials_ptr + pid_s.to(gl.int64) * 3 * N + offs_n
        gl.store(partials_ptrs, m, mask=mask_n)
        gl.store(partials_ptrs + N, s, mask=mask_n)
        gl.store(partials_ptrs + 2 * N, t, mask=mask_n)


@gluon.jit(do_not_specialize=["N", "V", "S"])  # they change from batch to batch: compile once for all
def linear_logprobs_forward_gluon_kernel(
    partials_ptr,  # [S, 3, N] float32, out
    masses_ptr,  # [J, N] float32, out, or None
    hidden_desc,  # [N, D], in blocks of [BLOCK_N, BLOCK_D]
    weight_desc,  # [V, D], in blocks of [BLOCK_V, BLOCK_D]
    targets_ptr,  # [N] int64
    N,
    V,
    D,
    S,
    scale,
    c,
    HAS_SOFTCAP: gl.constexpr,
    IS_NEGATIVE: gl.constexpr,
    TILE: gl.constexpr,
    GROUP_N: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Compute the partial results; `linear_logprobs_forward_gluon` launches this kernel."""
    hidden_ring = gl.allocate_shared_memory(hidden_desc.dtype, [STAGES, BLOCK_N, BLOCK_D], hidden_desc.layout)
    weight_ring = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, BLOCK_V, BLOCK_D], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    row_blocks = gl.cdiv(N, BLOCK_N)
    tiles = gl.cdiv(V, BLOCK_V)
    gl.warp_specialize(
        [
            (_consume, (
                0, partials_ptr, masses_ptr, targets_ptr, hidden_ring, weight_ring, full, empty, N, V, row_blocks,
                tiles, D, S, scale, c, HAS_SOFTCAP, IS_NEGATIVE, TILE, GROUP_N, BLOCK_N, BLOCK_V, BLOCK_D, STAGES,
            )),
            (_consume, (
                1, partials_ptr, masses_ptr, targets_ptr, hidden_ring, weight_ring, full, empty, N, V, row_blocks,
                tiles, D, S, scale, c, HAS_SOFTCAP, IS_NEGATIVE, TILE, GROUP_N, BLOCK_N, BLOCK_V, BLOCK_D, STAGES,
            )),
            (_produce, (
                hidden_desc, weight_desc, hidden_ring, weight_ring, full, empty, row_blocks, tiles, D, S,
                GROUP_N, BLOCK_N, BLOCK_V, BLOCK_D, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def fits_gluon(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the chip is a Hopper, whose matmul instruction this kernel uses, and TMA can read the inputs."""
    return fits_tma(hidden, weight) and torch.cuda.get_device_capability(hidden.device) == (9, 0)


def linear_logprobs_forward_gluon(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    cap: float | None,
    stats: bool,
    *,
    tile_masses: bool = False,
    config: Config | None = None,
    splits: int | None = None,
    **others: Any,
) -> ForwardOutput:
    """Launch the kernel, or hand the call to `linear_logprobs_forward` if it asks for more than the kernel serves.

    Arguments are those of `linear_logprobs_forward`; the kernel serves none of `others`, such as low_rank.
    """
    asks_for_more = bias is not None or stats or any(value is not None for value in others.values())
    if asks_for_more or not fits_gluon(hidden, weight):
        return linear_logprobs_forward(
            hidden, weight, targets, bias, scale, cap, stats,
            tile_masses=tile_masses, config=config, splits=splits, **others,
        )  # fmt: skip
    (N, D), V = hidden.shape, weight.shape[0]
    config = config or (SOFTCAPPED_MASSES_CONFIG if tile_masses and cap is not None else CONFIG)
    row_blocks, tiles = triton.cdiv(N, config.BLOCK_N), triton.cdiv(V, config.BLOCK_V)
    splits = splits or default_splits(row_blocks, tiles, processors(hidden))
    partials = hidden.new_empty((splits, 3, N), dtype=torch.float32)
    masses = hidden.new_empty((triton.cdiv(V, TILE), N), dtype=torch.float32) if tile_masses else None
    with torch.cuda.device_of(hidden):
        linear_logprobs_forward_gluon_kernel[(min(row_blocks * splits, processors(hidden)),)](
            partials, masses, _descriptor(hidden, config.BLOCK_N, config.BLOCK_D),
            _descriptor(weight, config.BLOCK_V, config.BLOCK_D), targets.contiguous(),
            N, V, D, splits, scale, exponent(scale, cap)[1],
            HAS_SOFTCAP=cap is not None, IS_NEGATIVE=cap is None and scale < 0, TILE=TILE, GROUP_N=GROUP_N,
            BLOCK_N=config.BLOCK_N, BLOCK_V=config.BLOCK_V, BLOCK_D=config.BLOCK_D, STAGES=config.num_stages,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    merged = merge(partials, (targets >= 0) & (targets < V), scale, cap)
    return ForwardOutput(*merged, None if masses is None else masses.T)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    return TensorDescriptor.from_tensor(
        x, [rows, columns], gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    )
