"""numba `open_groups`: bounds of the groups, then the best of them."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import FASTMATH, as_numpy, code_of, decode
from csrc_free_kernels.reference.open_groups import KEEP_BITS, check_open_groups, keep_units


@nb.njit(cache=True)
def keep_bounds(bounds, summary, pages, i_h, code):
    """Extremes [2, D] of the mean keys on the pages of one group; stored values are copied, bit for bit."""
    for d in range(bounds.shape[1]):
        bounds[0, d] = bounds[1, d] = summary[pages[0], i_h, 0, d]
        high = low = decode(bounds[0, d], code)
        for i in range(1, len(pages)):
            stored = summary[pages[i], i_h, 0, d]
            x = decode(stored, code)
            if x > high:
                high, bounds[0, d] = x, stored
            if x < low:
                low, bounds[1, d] = x, stored


@nb.njit(cache=True, fastmath=FASTMATH)
def bound_of(q, bounds, code):
    """Largest bound over the query heads: q [G, D], bounds [2, D]."""
    highest = np.float32(-np.inf)
    for g in range(q.shape[0]):
        total = np.float32(0.0)
        for d in range(q.shape[1]):
            b_q = decode(q[g, d], code)
            total += max(b_q * decode(bounds[0, d], code), b_q * decode(bounds[1, d], code))
        highest = max(highest, total)
    return highest


@nb.njit(cache=True, parallel=True)
def open_groups_kernel(
    q, group_bounds, summary, host_table, seq_lens, due, scores, is_open, block_size, group_blocks, keep, code
):  # fmt: skip
    num_rows, num_kv_heads, num_groups = scores.shape
    group = q.shape[1] // num_kv_heads
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        span = block_size * group_blocks
        complete = seq_lens[b] // span
        if seq_lens[b] > 0 and due[b] != 0:
            candidates = max(complete - 1, 0)
            x = scores[b, h]
            for m in range(candidates):
                x[m] = bound_of(q[b, h * group : (h + 1) * group], group_bounds[b, h, m], code)
                if np.isnan(x[m]):
                    x[m] = -np.inf
            kept = (np.int64(candidates) * keep + (1 << KEEP_BITS) - 1) >> KEEP_BITS
            order = np.argsort(-x[:candidates], kind="mergesort")
            is_open[b, h] = 1
            for m in order[kept:]:
                is_open[b, h, m] = 0
        if seq_lens[b] > 0 and seq_lens[b] % span == 0:
            pages = host_table[b, (complete - 1) * group_blocks : complete * group_blocks]
            keep_bounds(group_bounds[b, h, complete - 1], summary, pages, h, code)


def open_groups(
    q: Tensor,
    group_bounds: Tensor,
    summary: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    arrivals: Tensor | None,
    group_scores: Tensor,
    group_open: Tensor,
    *,
    block_size: int,
    group_blocks: int,
    keep: float,
    due: Tensor | None = None,
) -> None:
    """Mark the groups whose blocks are to be scored, and keep the bounds of a group that this token completes.

    Arguments and errors as in `csrc_free_kernels/reference/open_groups.py`; `arrivals` is not used.
    """
    check_open_groups(group_bounds, summary, host_table, group_blocks, keep)
    open_groups_kernel(
        as_numpy(q), as_numpy(group_bounds), as_numpy(summary), host_table.numpy(), seq_lens.numpy(),
        seq_lens.numpy() if due is None else due.numpy(), group_scores.numpy(), group_open.numpy(), block_size,
        group_blocks, keep_units(keep), code_of(q),
    )  # fmt: skip
