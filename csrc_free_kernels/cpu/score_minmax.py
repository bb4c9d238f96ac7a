"""numba `score_minmax`: upper bounds of the blocks' logits (Quest)."""

from typing import Literal

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import FASTMATH, as_numpy, code_of, decode
from csrc_free_kernels.reference.score_minmax import check_minmax


# One (row, head) an iteration. q [B, Hq, D], summary [P, Hkv, W, D] -> block_scores [B, Hkv, N].
@nb.njit(cache=True, parallel=True, fastmath=FASTMATH)
def score_minmax_kernel(q, summary, host_table, seq_lens, block_scores, scale, block_size, by_mean, code):
    num_rows, num_kv_heads, num_blocks = block_scores.shape
    group, dim = q.shape[1] // num_kv_heads, q.shape[2]
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        closed = min(seq_lens[b] // block_size, num_blocks)
        block_scores[b, h] = -np.inf
        b_q = np.empty((group, dim), np.float32)
        for g in range(group):
            for d in range(dim):
                b_q[g, d] = decode(q[b, h * group + g, d], code) * scale
        b_max = np.empty(dim, np.float32)
        b_min = np.empty(dim, np.float32)
        for n in range(closed):
            block = summary[max(host_table[b, n], 0), h]
            for u in range(0, summary.shape[2], 2):
                for d in range(dim):
                    b_max[d] = decode(block[u, d], code)
                    b_min[d] = decode(block[u + 1, d], code)
                highest, total = np.float32(-np.inf), np.float32(0.0)
                for g in range(group):
                    bound = np.float32(0.0)
                    for d in range(dim):
                        bound += max(b_q[g, d] * b_max[d], b_q[g, d] * b_min[d])
                    highest = max(highest, bound)
                    total += bound
                of_group = total / np.float32(group) if by_mean else highest
                block_scores[b, h, n] = max(block_scores[b, h, n], of_group)


def score_minmax(
    q: Tensor,
    summary: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    logits: Tensor | None,
    arrivals: Tensor | None,
    block_scores: Tensor,
    *,
    softmax_scale: float,
    block_size: int,
    group_by: Literal["max", "mean"] = "max",
) -> None:
    """Score every closed block by an upper bound of its logits: of a sub-unit over the group, then the best sub-unit.

    Arguments as in `csrc_free_kernels/reference/score_minmax.py`; `logits` is not used.

    Raises:
        ValueError: `summary` does not hold maxima and minima, another `group_by`, or q is not fp32, bf16 or fp16.
    """
    check_minmax(summary, group_by)
    score_minmax_kernel(
        as_numpy(q), as_numpy(summary), host_table.numpy(), seq_lens.numpy(), block_scores.numpy(),
        np.float32(softmax_scale), block_size, group_by == "mean", code_of(q),
    )  # fmt: skip
