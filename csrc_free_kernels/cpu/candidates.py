"""numba `decide` among the blocks of open groups: what is closed is cut out, scored and selected, and put back."""

from typing import Any

import numba as nb
import torch
from torch import Tensor

from csrc_free_kernels.cpu.score_mean import score_mean
from csrc_free_kernels.cpu.select import select


# One (row, head) an iteration: its candidates as a row of one head. ids, pages, own_heat [B * Hkv, K * R].
@nb.njit(cache=True, parallel=True)
def cut_out_kernel(
    opened, num_open, heat, host_table, due_lens, ids, pages, own_heat, lens, size, group_blocks
):
    num_rows, num_kv_heads, listed = opened.shape
    span = size * group_blocks
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        lens[i] = 0
        if due_lens[b] > 0:
            skipped = (due_lens[b] - 1) // span + 1 - num_open[b, h]
            lens[i] = due_lens[b] - skipped * span
        for m in range((lens[i] + size - 1) // size):
            block = opened[b, h, m // group_blocks] * group_blocks + m % group_blocks
            ids[i, m] = block
            pages[i, m] = max(host_table[b, block], 0) * num_kv_heads + h
            if own_heat.size > 0:
                own_heat[i, 0, m] = heat[b, h, block]


@nb.njit(cache=True, parallel=True)
def put_back_kernel(
    ids, lens, due_lens, seq_lens, own_heat, places, count, heat, selected, num_selected, size
):
    num_rows, num_kv_heads, width = selected.shape
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        if due_lens[b] == 0 and seq_lens[b] > 0:
            continue  # the row keeps its list
        num_selected[b, h] = count[i, 0]
        for s in range(width):
            selected[b, h, s] = ids[i, places[i, 0, s]] if places[i, 0, s] >= 0 else -1
        if own_heat.size > 0:
            for m in range((lens[i] + size - 1) // size):
                heat[b, h, ids[i, m]] = own_heat[i, 0, m]


def choose_in_groups(
    q: Tensor,
    summary: Tensor,
    heat: Tensor | None,
    due_lens: Tensor,
    host_table: Tensor,
    logits: Tensor,
    block_scores: Tensor,
    selected_blocks: Tensor,
    num_selected: Tensor,
    open_groups: Tensor,
    num_open: Tensor,
    group_blocks: int,
    seq_lens: Tensor,
    softmax_scale: float,
    shares: dict[str, Any],
) -> None:
    """Score and select among the candidates, as `_choose_in_groups` in `csrc_free_kernels/reference/decide.py`."""
    rows, heads, width = selected_blocks.shape
    candidates, size = block_scores.shape[2], shares["block_size"]
    ids, pages = (torch.empty(rows * heads, candidates, dtype=torch.int32) for _ in range(2))
    lens = torch.empty(rows * heads, dtype=torch.int32)
    own_heat = torch.empty((0, 0, 0) if heat is None else (rows * heads, 1, candidates))
    whole = own_heat if heat is None else heat
    cut_out_kernel(
        open_groups.numpy(), num_open.numpy(), whole.numpy(), host_table.numpy(), due_lens.numpy(), ids.numpy(),
        pages.numpy(), own_heat.numpy(), lens.numpy(), size, group_blocks,
    )  # fmt: skip
    scores = block_scores.flatten(0, 1)[:, None]
    score_mean(
        q.unflatten(1, (heads, -1)).flatten(0, 1), summary.flatten(0, 1)[:, None], pages, lens,
        logits.unflatten(1, (heads, -1)).flatten(0, 1), None, scores, softmax_scale=softmax_scale, block_size=size,
    )  # fmt: skip
    places = torch.empty(rows * heads, 1, width, dtype=torch.int32)
    count = torch.empty(rows * heads, 1, dtype=torch.int32)
    select(scores, None if heat is None else own_heat, lens, places, count, **shares)
    put_back_kernel(
        ids.numpy(), lens.numpy(), due_lens.numpy(), seq_lens.numpy(), own_heat.numpy(), places.numpy(),
        count.numpy(), whole.numpy(), selected_blocks.numpy(), num_selected.numpy(), size,
    )  # fmt: skip
