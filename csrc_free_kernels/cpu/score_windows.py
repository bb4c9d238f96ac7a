"""numba `score_windows`: softmax over overlapping windows of two sub-units, maximum or sum per block."""

from typing import Literal

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import FASTMATH, as_numpy, code_of
from csrc_free_kernels.cpu.score_mean import softmax, unit_logits


# One (row, head) an iteration. q [B, Hq, D], summary [P, Hkv, W, D] -> block_scores [B, Hkv, N].
@nb.njit(cache=True, parallel=True, fastmath=FASTMATH)
def score_windows_kernel(
    q, summary, host_table, seq_lens, logits, block_scores, scale, block_size, overlap, code
):
    num_rows, num_kv_heads, num_blocks = block_scores.shape
    group, width = q.shape[1] // num_kv_heads, summary.shape[2]
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        first, last = h * group, (h + 1) * group
        units = min(seq_lens[b] // (block_size // width), num_blocks * width)
        windows = units - 1
        scores = block_scores[b, h]
        scores[:] = -np.inf
        if windows > 0:
            rows = logits[b, first:last]
            unit_logits(q[b, first:last], summary, host_table[b], h, units, scale, rows, code)
            for g in range(group):
                for j in range(windows):  # the mean of two keys has the mean of their logits
                    rows[g, j] = (rows[g, j] + rows[g, j + 1]) * np.float32(0.5)
                softmax(rows[g], windows)
            weights = rows[0]
            for g in range(1, group):
                for j in range(windows):
                    weights[j] += rows[g, j]
            for n in range(min(num_blocks, windows // width + 1)):
                first_window, end = width * n - 1, width * n + width
                if overlap:
                    scores[n] = 0
                for j in range(max(first_window, 0), min(end, windows)):
                    if not overlap:
                        scores[n] = max(scores[n], weights[j])
                    elif j == first_window or j == end - 1:  # half of it lies in a neighbouring block
                        scores[n] += weights[j]
                    else:
                        scores[n] += 2 * weights[j]


def score_windows(
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
    pool: Literal["max", "overlap"] = "max",
) -> None:
    """Score blocks by the attention weights of the overlapping key windows that touch them.

    Arguments as in `csrc_free_kernels/reference/score_windows.py`; `logits` is fp32 [B, Hq, N * W] scratch.

    Raises:
        ValueError: q is not fp32, bf16 or fp16.
    """
    score_windows_kernel(
        as_numpy(q), as_numpy(summary), host_table.numpy(), seq_lens.numpy(), logits.numpy(),
        block_scores.numpy(), np.float32(softmax_scale), block_size, pool == "overlap", code_of(q),
    )  # fmt: skip
