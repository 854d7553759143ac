"""Planted faults of the head: lines of its kernels and of the op, changed so that a result or a bound is wrong.

None is known to be equivalent to the line it replaces.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """`new` for `old`, which occurs once in its file; of `tests`, arguments of pytest, one is to fail of it."""

    name: str
    tests: str
    description: str
    old: str
    new: str


# A few tests each, so that a fault takes seconds
FORWARD = "tests/test_forward_kernel.py -k 'float32 and (pointers or tma)'"
FORWARD_SHAPES = "tests/test_forward_kernel.py -k every_shape"
LOW_RANK = "tests/test_forward_kernel.py -k 'low_rank and not gradcheck'"
MASSES = "tests/test_forward_kernel.py -k mass_of"
OFFSETS = "tests/test_forward_kernel.py -k 2_to_the_31"
OUTSIDE = "tests/test_forward_kernel.py -k 'target_outside or shards'"
DLOGITS = "tests/test_forward_kernel.py -k 'test_backward or impossible'"
CHOICES = "tests/test_forward_kernel.py -k 'tma_is_for or no_more_shares or fill'"
STATS = "tests/test_impl_triton.py -k '(every_option and float64) or first_of_equal'"
EDGES = "tests/test_impl_triton.py -k 'only_token or tanh_is_small or float16_gradients or workspace'"
SPARSE = "tests/test_sparse_triton.py -k '(same_as and softcap) or shares_add or last_cell'"
LISTS = "tests/test_sparse_kernels.py -k row_lists"
RANGES = "tests/test_sparse_kernels.py -k float64-7"
LONG_LISTS = "tests/test_sparse_kernels.py -k 'dlogits_has or test_dweight'"
SPARSE_OFFSETS = "tests/test_sparse_kernels.py -k offsets"
BLAS = "tests/test_impl_blas.py"
TORCH = "tests/test_impl_torch.py"
CELLS = "tests/test_sparse_backward.py -k 'not units'"
OP = "tests/test_logprobs.py -k 'not opcheck and not compiles and not holds and not low_rank'"
RANKS = "tests/test_vocab_parallel.py -k 2-"

# fmt: off
FAULTS: dict[str, list[Fault]] = {  # by file
    "kernels/logits_tile.py": [
        Fault("hidden-size-edge", FORWARD, "the last tile of the hidden size takes one column too many",
              "mask_k = offs_k < K", "mask_k = offs_k <= K"),
        Fault("rows-int32", OFFSETS, "offsets of rows of hidden overflow",
              "offs_n = tl.minimum(offs_n, N - 1).to(tl.int64)", "offs_n = tl.minimum(offs_n, N - 1)"),
        Fault("columns-int32", OFFSETS, "offsets of rows of weight overflow",
              "offs_v = tl.minimum(offs_v, V - 1).to(tl.int64)", "offs_v = tl.minimum(offs_v, V - 1)"),
        Fault("depth-int32", OFFSETS, "offsets of columns of a transposed weight overflow",
              "offs_k = offs_k.to(tl.int64)", "offs_k = offs_k + 0"),
        Fault("contraction-restarts", FORWARD, "the third tile of D is the first again",
              "offs_k = k_start + tl.arange(0, BLOCK_K)", "offs_k = k_start % (2 * BLOCK_K) + tl.arange(0, BLOCK_K)"),
        Fault("bias-clamped", FORWARD, "the last token has its neighbour's bias",
              "tl.minimum(offs_v, V - 1)).to(z.dtype)", "tl.minimum(offs_v, V - 2)).to(z.dtype)"),
        Fault("cap-not-cooled", FORWARD, "temperature ignored with a soft-cap",
              "return logit_scale / softcap, softcap / temperature", "return logit_scale / softcap, softcap"),
        Fault("last-group-short", FORWARD, "an incomplete group of row blocks is walked as a whole one",
              "group_size = tl.minimum(row_blocks - group * GROUP_N, GROUP_N)", "group_size = GROUP_N"),
        Fault("tanh-even", FORWARD, "tanh(-y) = tanh(y)", "t = tl.where(y < 0, -t, t)",
              "t = tl.where(y < -99, -t, t)"),
        Fault("tanh-slope", FORWARD, "half the slope of tanh", "return t, 4 * e /", "return t, 2 * e /"),
        Fault("tanh-series", EDGES, "a sign in tanh's series", "(-17 / 315 +", "(17 / 315 +"),
    ],
    "kernels/online_logsumexp.py": [
        Fault("target-wraps", OUTSIDE, "a target of 2^32 + 3 is token 3",
              "return tl.where((targets >= 0) & (targets < V), targets, -1).to(tl.int32)",
              "return targets.to(tl.int32)"),
        Fault("sum-not-rescaled", STATS, "the sum does not decay when the maximum rises",
              "s = rescale * s + tl.sum(e, axis=1)", "s = s + tl.sum(e, axis=1)"),
        Fault("target-counted", FORWARD, "the target is among the other tokens",
              "in_vocab & (offs_v[None, :] != targets[:, None])", "in_vocab"),
        Fault("end-counted", OUTSIDE, "columns past the vocabulary are tokens where the tile holds no target",
              "holds_target | (v_start + BLOCK_V > V)", "holds_target"),
        Fault("mass-slope", FORWARD, "masses without the slope of the soft-cap", "            e *= slope",
              "            e *= 1.0"),
        Fault("mass-shift", FORWARD, "masses relative to the running maximum", "shift[:, None] + tl.log(", "tl.log("),
        Fault("last-mass", FORWARD, "the ragged last tile has no mass", "(offs_j < tl.cdiv(V, TILE))",
              "(offs_j < V // TILE)"),
        Fault("mass-of-nothing", MASSES, "an impossible tile has mass 1", 'tl.where(empty, float("-inf"), shift',
              "tl.where(empty, 0.0, shift"),
        Fault("entropy-shift-sign", STATS, "sum e (x - m) moves the wrong way",
              '0.0, m - shift)\n        x = tl.where(x == float("-inf"), 0.0, x',
              '0.0, shift - m)\n        x = tl.where(x == float("-inf"), 0.0, x'),
        Fault("squares-decay", STATS, "the sum of squares decays once", "rescale * rescale * sum_ee",
              "rescale * sum_ee"),
        Fault("before-itself", STATS, "the target comes before itself",
              "is_before = offs_v[None, :] < targets[:, None]", "is_before = offs_v[None, :] <= targets[:, None]"),
        Fault("target-elsewhere", OUTSIDE, "a target outside has logit 0", "t.sum(0).where(valid, -torch.inf)",
              "t.sum(0)"),
        Fault("entropy-drop", STATS, "shares' entropies merged without their distance",
              "(rescale * (ex + s * drop)).sum(0)", "(rescale * ex).sum(0)"),
        Fault("squares-norm", STATS, "sum of squares divided by the sum once", "- 2 * total.log()", "- total.log()"),
        Fault("share-first-only", FORWARD, "shares after the first are ignored", "total = (rescale * s).sum(0)",
              "total = (rescale * s)[0]"),
    ],
    "kernels/linear_logprobs_forward.py": [
        Fault("shares-rounded-down", FORWARD_SHAPES, "tiles that the shares do not divide are lost",
              "range(pid_s * tiles // S, (pid_s + 1) * tiles // S)",
              "range(pid_s * (tiles // S), (pid_s + 1) * (tiles // S))"),
        Fault("more-shares-than-tiles", CHOICES, "empty shares are launched", "GROUP_N))), tiles, MAX_SPLITS)",
              "GROUP_N))), MAX_SPLITS)"),
    ],
    "kernels/linear_logprobs_forward_tma.py": [
        Fault("tma-depth", FORWARD, "weight stays at the first tile of D",
              "weight_desc.load([tile * BLOCK_V, d_start])", "weight_desc.load([tile * BLOCK_V, 0])"),
        Fault("tma-last-pair", FORWARD, "the last pair of the grid is not computed",
              "row_blocks * S, tl.num_programs(0))", "row_blocks * S - 1, tl.num_programs(0))"),
        Fault("tma-bias", FORWARD, "no bias", "z = add_bias(z, bias_ptr, offs_v, V)", "z = z + 0.0"),
        Fault("tma-low-rank", LOW_RANK, "no low-rank addition",
              "z = add_low_rank(z, hidden2_ptr, weight2_ptr, offs_n, offs_v, N, V, R, ACC, UPCAST, BLOCK_D)",
              "z = z + 0.0"),
        Fault("tma-expanded", CHOICES, "an expanded row passes for a matrix", "and x.stride(0) >= x.shape[1]",
              "and x.stride(0) >= 0"),
        Fault("tma-misaligned", CHOICES, "8 bytes of alignment are enough for TMA", "x.data_ptr() % 16 == 0",
              "x.data_ptr() % 8 == 0"),
    ],
    "kernels/linear_logprobs_backward.py": [
        Fault("dlogits-scale", DLOGITS, "gradient under a soft-cap without the scale", "slope *= cap * scale",
              "slope *= cap"),
        Fault("dlogits-entropy-sign", DLOGITS, "the entropy's gradient has the wrong sign", "dx -= dentropy[:, None]",
              "dx += dentropy[:, None]"),
        Fault("dlogits-target", DLOGITS, "no tile is found to hold a target", ".to(tl.int32), axis=0) > 0:",
              ".to(tl.int32), axis=0) > 1:"),
        Fault("dlogits-int32", OFFSETS, "offsets of dlogits overflow", "offs_n.to(tl.int64)[:, None] * stride_dn",
              "offs_n[:, None] * stride_dn"),
        Fault("dlogits-last-column", DLOGITS, "the last token gets no gradient", "(offs_v < V)[None, :]",
              "(offs_v < V - 1)[None, :]"),
        Fault("dlogits-impossible", DLOGITS, "0 * -inf in the entropy's gradient", "tl.where(q == 0, 0.0, log_q)",
              "log_q"),
    ],
    "kernels/dlogits_rows.py": [
        Fault("rows-slope", BLAS, "slope of the soft-cap forgotten", "tl.load(dtarget_ptr + n), dx) * slope",
              "tl.load(dtarget_ptr + n), dx)"),
        Fault("rows-entropy-sign", BLAS, "the entropy's gradient has the wrong sign",
              "dx -= tl.load(dentropy_ptr + n)", "dx += tl.load(dentropy_ptr + n)"),
        Fault("rows-block", BLAS, "blocks of columns overlap", "tl.program_id(1) * BLOCK +",
              "tl.program_id(1) * (BLOCK - 1) +"),
    ],
    "kernels/fold_logits.py": [
        Fault("fold-decay", BLAS, "the sum does not decay", "s = decay * tl.load(s_ptr + n)",
              "s = tl.load(s_ptr + n)"),
        Fault("fold-slope", BLAS, "slope of the soft-cap forgotten in what is kept", "        e *= slope",
              "        e *= 1.0"),
        Fault("fold-before", BLAS, "the maximum after the target, not before", "is_other & (offs_c < target)",
              "is_other & (offs_c > target)"),
        Fault("fold-entropy", BLAS, "sum e (x - m) does not follow the maximum", "+ tl.load(s_ptr + n) * (m_old - m))",
              ")"),
        Fault("fold-target", BLAS, "a target in a tile's last column has no logit", "if (target >= 0) & (target < C):",
              "if (target >= 0) & (target < C - 1):"),
    ],
    "kernels/row_lists.py": [
        Fault("lists-restart", LISTS, "every block of rows begins the list anew",
              "place = count + tl.cumsum(active, axis=0) - active", "place = tl.cumsum(active, axis=0) - active"),
        Fault("lists-count", LISTS, "counts are of one block", "count += tl.sum(active, axis=0)",
              "count = tl.maximum(count, tl.sum(active, axis=0))"),
        Fault("lists-stride", LISTS, "tiles taken for neighbours in memory",
              "active_ptr + tile * stride_aj +", "active_ptr + tile +"),
    ],
    "kernels/sparse_dlogits.py": [
        Fault("cells-slope", SPARSE, "gradient under a soft-cap without the cap", "slope *= cap * scale",
              "slope *= scale"),
        Fault("cells-target", SPARSE, "the target gets the others' gradient too", "dtarget[:, None], dx)",
              "dtarget[:, None] + dx, dx)"),
        Fault("cells-low-rank", SPARSE, "no low-rank addition",
              "x = scale * add_low_rank(z, hidden2_ptr, weight2_ptr, offs_n, offs_v, N, V, R, ACC, UPCAST, BLOCK_D)",
              "x = scale * z"),
        Fault("cells-last-column", SPARSE, "the last token gets no gradient", "(offs_v < V)[None, :]",
              "(offs_v < V - 1)[None, :]"),
        Fault("cells-first-block", LONG_LISTS, "only the first block of a list is computed",
              "i_start = tl.program_id(0) % row_blocks * BLOCK_N", "i_start = tl.program_id(0) % row_blocks * 0"),
        Fault("cells-int32", SPARSE_OFFSETS, "offsets of dlogits overflow",
              "offs_n.to(tl.int64)[:, None] * stride_dn", "offs_n[:, None] * stride_dn"),
    ],
    "kernels/sparse_dhidden.py": [
        Fault("dhidden-overwritten", SPARSE, "the last active tile is all there is",
              "dhidden = tl.load(dhidden_ptrs, mask=mask, other=0.0)", "dhidden = tl.zeros((BLOCK_N, BLOCK_D), ACC)"),
        Fault("dhidden-stop", SPARSE, "the last row of a range is left out", "tile * (R + 1) + pid_r + 1)",
              "tile * (R + 1) + pid_r + 1) - 1"),
        Fault("dhidden-ranges", RANGES, "rows that the ranges do not divide are left out",
              "device=rows.device) * triton.cdiv(N, ranges)", "device=rows.device) * (N // ranges)"),
        Fault("dhidden-edge", SPARSE, "the last column gets nothing", "mask_d = offs_d < D",
              "mask_d = offs_d < D - 1"),
        Fault("dhidden-rows-int32", SPARSE_OFFSETS, "offsets of rows overflow",
              "mask=mask_n, other=0).to(tl.int64)", "mask=mask_n, other=0)"),
        Fault("dhidden-columns-int32", SPARSE_OFFSETS, "offsets of rows of weight overflow",
              "offs_v = offs_v.to(tl.int64)", "offs_v = offs_v + 0"),
    ],
    "kernels/sparse_dweight.py": [
        Fault("dweight-accumulate", SPARSE, "the flag is reversed", "ACCUMULATE=accumulate",
              "ACCUMULATE=not accumulate"),
        Fault("dweight-first-block", LONG_LISTS, "only the first block of a list counts",
              "for i_start in range(0, count, BLOCK_N):",
              "for i_start in range(0, tl.minimum(count, BLOCK_N), BLOCK_N):"),
        Fault("dbias-last-block", LONG_LISTS, "only the last block of a list counts",
              "dbias += tl.sum(dlogits.to(ACC), axis=1)", "dbias = tl.sum(dlogits.to(ACC), axis=1)"),
        Fault("dweight-rows-int32", SPARSE_OFFSETS, "offsets of rows overflow",
              "mask=mask_n, other=0).to(tl.int64)", "mask=mask_n, other=0)"),
        Fault("dweight-columns-int32", SPARSE_OFFSETS, "offsets of rows of dweight overflow",
              "offs_v = offs_v.to(tl.int64)", "offs_v = offs_v + 0"),
    ],
    "fastdpo/impl/triton.py": [
        Fault("shares-not-normalised", SPARSE, "shares are masses", "(part.tile_masses - part.others[:, None]).exp_()",
              "part.tile_masses.exp()"),
        Fault("unboost", EDGES, "float16's power of two stays in the gradients", "else accumulator / boost",
              "else accumulator"),
        Fault("only-token", EDGES, "q is infinite where there is no other token",
              "result.others.masked_fill(result.others == -torch.inf, torch.inf)", "result.others"),
        Fault("workspace-twice", EDGES, "twice the workspace is used", "half = workspace // 2", "half = workspace"),
        Fault("bias-sum-kept", STATS, "dbias of a chunk begins with that of the one before",
              "total.mul_(float(rs.start > 0))", "total.mul_(1.0)"),
        Fault("dweight-sum-kept", STATS, "dweight of a chunk begins with that of the one before",
              "dlogits.T, self.hidden[rs], beta=float(rs.start > 0))", "dlogits.T, self.hidden[rs])"),
        Fault("spread-column", SPARSE, "weight2 and bias get weight's part of the skipped mass", "column += size",
              "column += 0"),
        Fault("spread-dhidden", SPARSE, "the skipped mass is dropped from dhidden", "factor.dhidden.add_(part)",
              "factor.dhidden.add_(part, alpha=0)"),
        Fault("chunk-targets", SPARSE, "targets not counted from the chunk's first column",
              "head.weight[vs], targets[rs] - vs.start", "head.weight[vs], targets[rs]"),
        Fault("gradient-replaced-too", OP, "the gradient that was there is lost", "total + weight_grad[vs] if out",
              "total if out"),
        Fault("needs-weight", SPARSE, "a gradient that nobody needs",
              "torch.empty_like(weight) if needs_weight else None", "torch.empty_like(weight)"),
    ],
    "fastdpo/impl/torch.py": [
        Fault("expected-decay", TORCH, "the kept mean of weight does not decay",
              "kept.expected[rs].mul_(tile.decay[:, None])", "kept.expected[rs]"),
        Fault("expected-norm", OP, "the kept mean of weight is a sum",
              "running.s.clamp(min=torch.finfo(dtype).tiny)[:, None]", "running.s.clamp(min=1)[:, None] ** 0"),
        Fault("expected-slope", OP, "slope of the soft-cap forgotten at the target",
              "rows.dtarget * target_slope(result.target, head.transform)", "rows.dtarget"),
        Fault("probs-factor", TORCH, "all kept probabilities have the first block's factor",
              "kept.factors[at, (vs.start - first_kept) // cols]", "kept.factors[at, 0]"),
        Fault("shares-factor", CELLS, "shares not normalised", "shares.mul_(factor[:, None])", "shares.mul_(1.0)"),
        Fault("gradient-replaced", OP, "the gradient that was there is lost", "weight_grad[vs] += dw",
              "weight_grad[vs] = dw"),
        Fault("weight-mass", CELLS, "the skipped mass is dropped from dweight", "dw += every[:, :-1]", "dw += 0"),
        Fault("bias-mass", SPARSE, "the skipped mass is dropped from dbias", "db += every[:, -1]", "db += 0"),
        Fault("workspace-ignored", TORCH, "tiles do not shrink to the workspace", "min(max_cols, fitting) // CELL",
              "min(max_cols, 10**9) // CELL"),
    ],
    "fastdpo/impl/tiles.py": [
        Fault("tile-target", TORCH, "the target is among the other tokens", "picked.masked_fill(here, MASKED)",
              "picked"),
        Fault("tile-before", TORCH, "the maximum after the target, not before", "torch.where(first < targets",
              "torch.where(first > targets"),
        Fault("tile-squares", TORCH, "the sum of squares decays once", "mul_(decay.square())", "mul_(decay)"),
        Fault("tile-bias", TORCH, "bias without the scale", "beta=0.0 if bias is None else alpha",
              "beta=0.0 if bias is None else 1.0"),
        Fault("tile-entropy-sign", BLAS, "the entropy's gradient has the wrong sign",
              "rows.dothers[:, None] - rows.dentropy", "rows.dothers[:, None] + rows.dentropy"),
        Fault("last-mean", SPARSE, "mean of the ragged cell over T",
              "weight[whole:].mean(0, keepdim=True, dtype=dtype)",
              "weight[whole:].sum(0, keepdim=True, dtype=dtype) / T"),
    ],
    "fastdpo/impl/blas.py": [
        Fault("blas-targets", BLAS, "targets not counted from the tile's first column", "rows.targets - vs.start",
              "rows.targets"),
        Fault("blas-beta", BLAS, "alpha for beta", "transform.folded[1]", "transform.folded[0]"),
    ],
    "fastdpo/impl/sparsity.py": [
        Fault("spread-size", CELLS, "the ragged cell's mass is spread over T",
              "sizes[-1] = V - (shares.shape[1] - 1) * T", "sizes[-1] = T"),
        Fault("spread-all", CELLS, "the mass of active cells is spread too",
              "some.dothers[:, None]).masked_fill(active, 0)", "some.dothers[:, None])"),
        Fault("threshold-reversed", CELLS, "small cells are computed, large ones are not",
              "active = (shares > threshold.unsqueeze(1)) |", "active = (shares < threshold.unsqueeze(1)) |"),
        Fault("target-cell", CELLS, "the target's cell may be skipped", " | (tiles == target_tiles.unsqueeze(1))", ""),
        Fault("upstream-ignored", CELLS, "rows without a gradient are computed",
              "return active & upstream.unsqueeze(1)", "return active"),
        Fault("tolerance-doubled", CELLS, "a row may skip twice the mass",
              "skipped(larger) <= tolerance", "skipped(larger) <= 2 * tolerance"),
        Fault("threshold-coarse", CELLS, "a row skips less than it may", "range(STEPS)):", "range(1, STEPS)):"),
        Fault("threshold-of-mass", CELLS, "threshold of masses compared with shares",
              "threshold = torch.exp2(-exponent) / rest", "threshold = torch.exp2(-exponent)"),
        Fault("bound-of-shares", CELLS, "the bound is of shares, not of masses",
              "mass = shares.float() * rest.float().unsqueeze(1)", "mass = shares.float()"),
    ],
    "fastdpo/op.py": [
        Fault("shard-start", RANKS, "targets not counted from the shard's first token",
              "return self.targets - self.vocab_start if self.vocab_start else self.targets", "return self.targets"),
        Fault("kept-for-entropy", "tests/test_logprobs.py -k low_rank_and_entropy",
              "what was kept for log-probabilities serves for the entropy",
              "result = result._replace(kept=Kept())", "result = result._replace()"),
        Fault("rest-reversed", CELLS, "cells chosen by p, not by 1 - p",
              "torch.sigmoid(result.others - result.target)", "torch.sigmoid(result.target - result.others)"),
        Fault("target-V", OP, "target V is accepted", "(targets < 0) | (targets >= V)",
              "(targets < 0) | (targets > V)"),
    ],
    "fastdpo/logprobs.py": [
        Fault("target-not-nan", TORCH, "a target outside has a log-probability", "torch.where(valid, 1.0, math.nan)",
              "torch.where(valid, 1.0, 1.0)"),
        Fault("rest-entropy", TORCH, "the entropy's parts put together with the wrong sign",
              "rest * (stats.entropy - log_rest", "rest * (stats.entropy + log_rest"),
        Fault("rest-squared", TORCH, "(1 - p) for its square", "2 * log_rest + stats.log_sum_sq",
              "log_rest + stats.log_sum_sq"),
        Fault("first-maximum", TORCH, "the first of equal maxima is not the top one", "(result.target >= stats.top)",
              "(result.target > stats.top)"),
        Fault("auto-wide", CELLS, "auto is sparse in float32", '(backward == "auto" and hidden.element_size() == 2)',
              '(backward == "auto")'),
        Fault("workspace-floor", OP, "a workspace of nothing is accepted", "if workspace < 2**20:",
              "if workspace < 2**9:"),
        Fault("autocast-float64", OP, "autocast narrows float64", "if hidden.dtype == torch.float64 or not", "if not"),
        Fault("shard-hidden", RANKS, "hidden's gradient is that of one shard",
              "hidden = vocab_parallel.sum_gradients(hidden, group)", "pass"),
    ],
    "fastdpo/vocab_parallel.py": [
        Fault("shard-max", RANKS, "ranks merge relative to their maximum", "merged = largest[1] + total.log()",
              "merged = total.log()"),
        Fault("shard-share", RANKS, "every rank has the whole gradient of the others", "dothers * share, None",
              "dothers, None"),
        Fault("shard-target", RANKS, "every rank has the target's gradient", "dtarget.where(mine, 0.0)", "dtarget"),
    ],
}
