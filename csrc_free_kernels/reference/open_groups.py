"""Truth of `open_groups`: which groups of blocks a step scores, by an upper bound of their logits."""

import math

import torch
from torch import Tensor

KEEP_BITS = 20  # a share of the groups is a multiple of 2^-20, so that every home keeps as many


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

    A group is complete when all its blocks are closed. The newest complete group and what follows it are always open;
    of the groups before it the share `keep` with the highest bounds, rounded up, ties to the lower one. A bound is the
    largest over the query heads of sum over channels of max(q * max, q * min) (Quest, arXiv:2406.10774): no mean key of
    the group has a larger product with q. The extremes of a group are those of stored values, so nothing is rounded.

    Args:
        q: [B, Hq, D] after RoPE.
        group_bounds: [B, Hkv, M, 2, D], channel-wise max, then min, of the mean keys of every complete group but the
            newest; written where a row's token completes a group (`seq_len` is a multiple of its tokens).
        summary: [P, Hkv, 1, D] mean keys by host page.
        host_table: int32 [B, N], N at most M * group_blocks.
        seq_lens: int32 [B], tokens; 0 = inactive.
        arrivals: int32 [B, Hkv], zero before and after; for the Triton home only, else None.
        group_scores: fp32 [B, Hkv, M] scratch.
        group_open: uint8 [B, Hkv, M], 0 or 1; written in full for the rows that are active and due.
        block_size: tokens in a block.
        group_blocks: blocks in a group.
        keep: share of the groups before the newest complete one that is open, above 0, at most 1.
        due: int32 [B], rows at 0 keep what `group_open` holds; None: every row is due.

    Raises:
        ValueError: `keep` is out of range, or the bounds do not cover the table.
    """
    check_open_groups(group_bounds, summary, host_table, group_blocks, keep)
    complete = seq_lens // (block_size * group_blocks)
    groups = torch.arange(group_bounds.shape[2], device=q.device)
    candidate = (groups < (complete - 1)[:, None])[:, None]  # [B, 1, M]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = q.to(wide).unflatten(1, (group_bounds.shape[1], -1))[:, :, :, None]  # [B, Hkv, G, 1, D]
    high, low = group_bounds.to(wide).unbind(3)
    products = torch.maximum(heads * high[:, :, None], heads * low[:, :, None])
    scores = products.sum(-1).amax(2)
    scores = torch.where(scores.isnan() | ~candidate, -torch.inf, scores) + 0.0
    group_scores.copy_(scores)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, groups.expand_as(order))
    kept = (complete - 1).clamp(min=0).long() * keep_units(keep) + 2**KEEP_BITS - 1 >> KEEP_BITS
    marked = ~candidate | (rank < kept[:, None, None])
    written = seq_lens > 0 if due is None else (seq_lens > 0) & (due != 0)
    group_open.copy_(torch.where(written[:, None, None], marked, group_open.bool()))
    for b, seq_len in enumerate(seq_lens.tolist()):
        if seq_len > 0 and seq_len % (block_size * group_blocks) == 0:
            last = seq_len // (block_size * group_blocks) - 1
            pages = host_table[b, last * group_blocks : (last + 1) * group_blocks].long()
            group_bounds[b, :, last] = bounds_of(summary[pages], group_blocks)[:, 0]


def bounds_of(summary: Tensor, group_blocks: int) -> Tensor:
    """Return the extremes [Hkv, M, 2, D] of mean keys [M * group_blocks, Hkv, 1, D], blocks in order."""
    by_group = summary[:, :, 0].unflatten(0, (-1, group_blocks))
    return torch.stack((by_group.amax(1), by_group.amin(1)), 2).transpose(0, 1)


def keep_units(keep: float) -> int:
    """Return a share in units of 2^-KEEP_BITS, rounded up."""
    return math.ceil(keep * 2**KEEP_BITS)


def check_open_groups(
    group_bounds: Tensor, summary: Tensor, host_table: Tensor, group_blocks: int, keep: float
) -> None:
    """Raise ValueError for a share out of range or shapes that do not go together."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, not {keep}")
    if summary.shape[2] != 1:
        raise ValueError(f"open_groups takes one mean a block, not {summary.shape[2]}")
    if group_bounds.shape[2] * group_blocks < host_table.shape[1]:
        raise ValueError(
            f"{group_bounds.shape[2]} groups of {group_blocks} blocks do not cover {host_table.shape[1]} blocks"
        )
