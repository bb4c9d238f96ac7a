"""numba `score_mean`, and the raw logits that it shares with `score_windows`."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import FASTMATH, as_numpy, code_of, decode


@nb.njit(cache=True, fastmath=FASTMATH)
def unit_logits(q, summary, pages, i_h, num_units, scale, logits, code):
    """Raw logits of one (row, head): q [G, D], pages [N] -> logits[:, :num_units] of [G, N * W]."""
    group, dim = q.shape
    width = summary.shape[2]
    b_q = np.empty((group, dim), np.float32)
    for g in range(group):
        for d in range(dim):
            b_q[g, d] = decode(q[g, d], code) * scale
    b_k = np.empty(dim, np.float32)
    for u in range(num_units):
        row = summary[max(pages[u // width], 0), i_h, u % width]
        for d in range(dim):
            b_k[d] = decode(row[d], code)
        for g in range(group):
            total = np.float32(0.0)
            for d in range(dim):
                total += b_q[g, d] * b_k[d]
            logits[g, u] = total


@nb.njit(cache=True, fastmath=FASTMATH)
def softmax(x, n):
    """Softmax of x[:n] in place (n >= 1)."""
    top = x[0]
    for i in range(1, n):
        top = max(top, x[i])
    total = np.float32(0.0)
    for i in range(n):
        x[i] = np.exp(x[i] - top)
        total += x[i]
    inverse = np.float32(1.0) / total
    for i in range(n):
        x[i] *= inverse


# One (row, head) an iteration. q [B, Hq, D], summary [P, Hkv, 1, D] -> block_scores [B, Hkv, N].
@nb.njit(cache=True, parallel=True, fastmath=FASTMATH)
def score_mean_kernel(q, summary, host_table, seq_lens, logits, block_scores, scale, block_size, code):
    num_rows, num_kv_heads, num_blocks = block_scores.shape
    group = q.shape[1] // num_kv_heads
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        first, last = h * group, (h + 1) * group
        closed = min(seq_lens[b] // block_size, num_blocks)
        scores = block_scores[b, h]
        scores[:closed] = 0.0
        scores[closed:] = -np.inf
        if closed > 0:
            rows = logits[b, first:last]
            unit_logits(q[b, first:last], summary, host_table[b], h, closed, scale, rows, code)
            for g in range(group):
                softmax(rows[g], closed)
                for n in range(closed):
                    scores[n] += rows[g, n] / np.float32(group)


def score_mean(
    q: Tensor,
    summary: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    logits: Tensor,
    arrivals: Tensor | None,
    block_scores: Tensor,
    *,
    softmax_scale: float,
    block_size: int,
) -> None:
    """Score every closed block by the softmax of its mean key, averaged over the query heads of the group.

    Arguments as in `csrc_free_kernels/reference/score_mean.py`; `logits` is fp32 [B, Hq, N] scratch.

    Raises:
        ValueError: `summary` does not hold one vector a block, or q is not fp32, bf16 or fp16.
    """
    if summary.shape[2] != 1:
        raise ValueError(f"score_mean takes one mean a block, not {summary.shape[2]}")
    score_mean_kernel(
        as_numpy(q), as_numpy(summary), host_table.numpy(), seq_lens.numpy(), logits.numpy(),
        block_scores.numpy(), np.float32(softmax_scale), block_size, code_of(q),
    )  # fmt: skip
