"""Truth of `open_groups`: the groups of blocks that a step looks into, by a bound of their logits and by heat."""

import torch
from torch import Tensor
from torch.nn import functional as F

from csrc_free_kernels.reference.select import select


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

    A group is `group_blocks` consecutive blocks, complete when all of them are closed. Groups are selected as `select`
    selects blocks of `block_size * group_blocks` tokens: the first and the last ones, the best for the query, the
    hottest of what is left; all of them while they are no more than the list holds. The score of a group is the largest
    over its query heads of the sum over channels of max(q * max, q * min) (Quest, arXiv:2406.10774): no mean key of the
    group has a larger product with q. Its heat is that of its hottest block.

    Args:
        q: [B, Hq, D] after RoPE.
        group_bounds: [B, Hkv, M, 2, D], channel-wise max, then min, of the mean keys of every complete group; written
            where a row's token completes a group, due or not. Only complete groups ahead of the forced recent ones are
            ranked, so others may hold anything.
        summary: [P, Hkv, 1, D] mean keys by host page.
        heat: fp32 [B, Hkv, N], only read; may be None when `agnostic_groups == 0`.
        host_table: int32 [B, N], N at most M * group_blocks.
        seq_lens: int32 [B], tokens; 0 = inactive.
        arrivals: int32 [B, Hkv], zero before and after; for the Triton home only, else None.
        group_scores: fp32 [B, Hkv, 2, M] scratch: scores and heat of the groups.
        open_groups: int32 [B, Hkv, K], written in full: ids of the open groups ascending, then -1. K is the sum of the
            four numbers of groups.
        num_open: int32 [B, Hkv], written.
        block_size: tokens in a block.
        group_blocks: blocks in a group.
        sink_groups: groups open at the start.
        recent_groups: groups open at the end, the one of the tail included; at least 2, so that the newest complete
            group is among them.
        query_groups: groups opened by score.
        agnostic_groups: groups opened by heat among what is left.
        due: int32 [B], active rows at 0 keep what the lists hold; None: every row is due.

    Raises:
        ValueError: numbers or shapes that do not go together, or heat is needed and not given.
    """
    shares = (sink_groups, recent_groups, query_groups, agnostic_groups)
    check_open_groups(group_bounds, summary, heat, host_table, open_groups, group_blocks, shares)
    span = block_size * group_blocks
    for b, seq_len in enumerate(seq_lens.tolist()):
        if seq_len > 0 and seq_len % span == 0:
            last = seq_len // span - 1
            pages = host_table[b, last * group_blocks : (last + 1) * group_blocks].long()
            keys = summary[pages, :, 0]
            group_bounds[b, :, last] = torch.stack((keys.amax(0), keys.amin(0)), 1)
    ranked = (
        torch.arange(group_bounds.shape[2], device=q.device)
        < ((seq_lens - 1) // span + 1 - recent_groups)[:, None]
    )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = q.to(wide).unflatten(1, (group_bounds.shape[1], -1))[:, :, :, None]  # [B, Hkv, G, 1, D]
    high, low = group_bounds.to(wide)[:, :, None].unbind(4)
    scores = torch.maximum(heads * high, heads * low).sum(-1).amax(2)
    of_query, of_heat = group_scores.unbind(2)
    of_query.copy_(torch.where(ranked[:, None] & ~scores.isnan(), scores, -torch.inf))
    if heat is not None:
        of_heat.copy_(heat_of_groups(heat, group_blocks))
    select(
        of_query, None if heat is None else of_heat, seq_lens, open_groups, num_open,
        block_size=span, sink_blocks=sink_groups, recent_blocks=recent_groups, query_blocks=query_groups,
        agnostic_blocks=agnostic_groups, heat_decay=1.0, normalise="none", due=due,
    )  # fmt: skip


def heat_of_groups(heat: Tensor, group_blocks: int) -> Tensor:
    """Return the heat of the hottest block of every group, [B, Hkv, ceil(N / group_blocks)]; NaN counts as -inf."""
    known = torch.where(heat.isnan(), -torch.inf, heat)
    whole = F.pad(known, (0, -heat.shape[2] % group_blocks), value=-torch.inf)
    return whole.unflatten(2, (-1, group_blocks)).amax(3)


def check_open_groups(
    group_bounds: Tensor,
    summary: Tensor,
    heat: Tensor | None,
    host_table: Tensor,
    open_groups: Tensor,
    group_blocks: int,
    shares: tuple[int, int, int, int],
) -> None:
    """Raise ValueError for numbers of groups (sink, recent, query, agnostic) or shapes that do not go together."""
    if shares[1] < 2:
        raise ValueError(
            f"recent_groups must be at least 2, not {shares[1]}: the newest complete group is not ranked"
        )
    if sum(shares) != open_groups.shape[2]:
        raise ValueError(f"lists of {open_groups.shape[2]} groups cannot hold {' + '.join(map(str, shares))}")
    if shares[3] > 0 and heat is None:
        raise ValueError(f"agnostic_groups = {shares[3]} needs heat")
    if summary.shape[2] != 1:
        raise ValueError(f"open_groups takes one mean a block, not {summary.shape[2]}")
    if group_bounds.shape[2] != -(-host_table.shape[1] // group_blocks):
        raise ValueError(
            f"{group_bounds.shape[2]} groups of {group_blocks} blocks are not those of {host_table.shape[1]} blocks"
        )
