"""numba `open_groups`: bounds and heat of the groups, then `select` among them."""

import numba as nb
import numpy as np
import torch
from torch import Tensor

from csrc_free_kernels.cpu.bits import FASTMATH, as_numpy, code_of, decode
from csrc_free_kernels.cpu.select import select
from csrc_free_kernels.reference.open_groups import check_open_groups

NOTHING = torch.empty(0, 0, 0)  # stands for heat that is not given


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


@nb.njit(cache=True)
def hottest_block(heat):
    """Largest heat of a group's blocks; NaN counts as -inf."""
    top = np.float32(-np.inf)
    for x in heat:
        if x > top:
            top = x
    return top


# One (row, head) an iteration. group_bounds [B, Hkv, M, 2, D], heat [B, Hkv, N] -> scores and hottest [B, Hkv, M].
@nb.njit(cache=True, parallel=True)
def open_groups_kernel(
    q, group_bounds, summary, heat, host_table, seq_lens, scores, hottest, block_size, group_blocks, recent, by_heat,
    code,
):  # fmt: skip
    num_rows, num_kv_heads, num_groups = scores.shape
    group = q.shape[1] // num_kv_heads
    span = block_size * group_blocks
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        scores[b, h] = -np.inf
        for m in range(min(max((seq_lens[b] + span - 1) // span - recent, 0), num_groups)):
            scores[b, h, m] = bound_of(q[b, h * group : (h + 1) * group], group_bounds[b, h, m], code)
            if by_heat:
                hottest[b, h, m] = hottest_block(heat[b, h, m * group_blocks : (m + 1) * group_blocks])
        if seq_lens[b] > 0 and seq_lens[b] % span == 0:
            last = seq_lens[b] // span - 1
            pages = host_table[b, last * group_blocks : (last + 1) * group_blocks]
            keep_bounds(group_bounds[b, h, last], summary, pages, h, code)


def open_groups(
    q: Tensor,
    group_bounds: Tensor,
    summary: Tensor,
    heat: Tensor | None,
    host_table: Tensor,
    seq_lens: Tensor,
    arrivals: Tensor | None,
    group_scores: Tensor,
    open_groups: Tensor,
    num_open: Tensor,
    *,
    block_size: int,
    group_blocks: int,
    sink_groups: int,
    recent_groups: int,
    query_groups: int,
    agnostic_groups: int,
    due: Tensor | None = None,
) -> None:
    """List the groups whose blocks `decide` ranks, and keep the bounds of a group that a row's token completes.

    Arguments and errors as in `csrc_free_kernels/reference/open_groups.py`; `arrivals` is not used.
    """
    shares = (sink_groups, recent_groups, query_groups, agnostic_groups)
    check_open_groups(group_bounds, summary, heat, host_table, open_groups, group_blocks, shares)
    scores, hottest = group_scores.unbind(2)
    open_groups_kernel(
        as_numpy(q), as_numpy(group_bounds), as_numpy(summary), (NOTHING if heat is None else heat).numpy(),
        host_table.numpy(), seq_lens.numpy(), scores.numpy(), hottest.numpy(), block_size, group_blocks, recent_groups,
        agnostic_groups > 0, code_of(q),
    )  # fmt: skip
    select(
        scores, hottest if agnostic_groups else None, seq_lens, open_groups, num_open,
        block_size=block_size * group_blocks, sink_blocks=sink_groups, recent_blocks=recent_groups,
        query_blocks=query_groups, agnostic_blocks=agnostic_groups, heat_decay=1.0, normalise="none", due=due,
    )  # fmt: skip
