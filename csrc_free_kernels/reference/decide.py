"""Truth of `decide`: score, select and resolve, one after the other."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from csrc_free_kernels.reference.resolve import resolve
from csrc_free_kernels.reference.score_mean import score_mean
from csrc_free_kernels.reference.score_minmax import score_minmax
from csrc_free_kernels.reference.score_windows import score_windows
from csrc_free_kernels.reference.select import select

SCORERS: dict[str, Callable[..., None]] = {
    "mean": score_mean,
    "windows": score_windows,
    "minmax": score_minmax,
}


def decide(
    q: Tensor | None,
    summary: Tensor | None,
    heat: Tensor | None,
    seq_lens: Tensor,
    host_table: Tensor,
    slot_of: Tensor,
    block_in: Tensor,
    last_used: Tensor,
    slot_base: Tensor,
    slot_count: Tensor,
    step: Tensor,
    logits: Tensor | None,
    arrivals: Tensor | None,
    block_scores: Tensor | None,
    selected_blocks: Tensor,
    num_selected: Tensor,
    hit_slots: Tensor,
    miss_slots: Tensor,
    load_src: Tensor,
    load_dst: Tensor,
    load_at: Tensor,
    load_count: Tensor,
    counters: Tensor,
    *,
    score: Literal["mean", "windows", "minmax", "given", "none"],
    softmax_scale: float,
    block_size: int,
    sink_blocks: int,
    recent_blocks: int,
    query_blocks: int,
    agnostic_blocks: int,
    heat_decay: float,
    normalise: str,
    rule: str = "fixed",
    limit: float = 0.0,
    due: Tensor | None = None,
    open_groups: Tensor | None = None,
    num_open: Tensor | None = None,
    group_blocks: int = 1,
) -> None:
    """Score, select and resolve: which blocks this step attends to, where they are, what must be loaded.

    Means exactly what the ops `score_<score>`, `select` and `resolve` mean one after the other.

    With `open_groups`, which the op of that name wrote, scoring and selection see each (row, head) as if the blocks of
    the groups that are not listed had been cut out of it: scores are normalised over the closed blocks of open groups,
    only those are ranked, by score and by heat, and only their heat decays and grows. The heat of other blocks waits.
    The sink and the recent blocks lie in open groups. Where every group is listed, nothing is cut out.

    Args:
        q: [B, Hq, D] after RoPE; like `summary` not used, and may be None, where `score` is given or none.
        summary: [P, Hkv, W, D] block summaries of the kind that `score` ranks by.
        heat: fp32 [B, Hkv, N], updated in place; None as `select` allows.
        seq_lens: int32 [B], tokens; 0 = inactive.
        host_table: int32 [B, N], logical block -> host page.
        slot_of, block_in, last_used: int32 [B, Hkv, N], [L], [L], updated in place.
        slot_base, slot_count: int32 [B, Hkv]; any number of slots, none included.
        step: int32 [1].
        logits: fp32 [B, Hq, N * W] scratch for mean and windows, else None.
        arrivals: int32 [B, Hkv], zero before and after; for the Triton home where it scores, else None.
        block_scores: fp32 [B, Hkv, N]: written in full by mean, windows and minmax; read for given; None for
            none.
        selected_blocks, num_selected: int32 [B, Hkv, S], [B, Hkv], written in full.
        hit_slots, miss_slots: int32 [B, Hkv, S], written in full.
        load_src, load_dst, load_at, load_count: the load list, int32 [max_loads] thrice, [1], added to.
        counters: int64 [B, Hkv, 5], added to.
        score: how blocks are ranked; `given`: by what the caller put into `block_scores`; `none`: not at all.
        softmax_scale: factor on q.k.
        block_size: tokens in a block.
        sink_blocks, recent_blocks: blocks forced at the start and at the end.
        query_blocks, agnostic_blocks: blocks taken by score, and by heat among what is left.
        heat_decay: factor on the old heat.
        normalise: how scores enter the heat: "sum", "softmax" or "none".
        rule, limit: how many of `query_blocks` are taken, as in `select`.
        due: int32 [B], 0 or 1, as in `select`: rows at 0 are not scored (their `block_scores` become -inf unless
            given) and keep the lists, which are resolved as ever. None: every row is due.
        open_groups, num_open: int32 [B, Hkv, K], [B, Hkv]; for mean scores and the fixed rule only. `block_scores` is
            then [B, Hkv, K * group_blocks] and `logits` [B, Hq, K * group_blocks], by candidate: number m is block
            `open_groups[m // group_blocks] * group_blocks + m % group_blocks`, -inf where there is no closed block.
            None: every block is a candidate.
        group_blocks: blocks in a group.

    Raises:
        ValueError: an unknown `score`, one of the errors of the three ops, or groups where they mean nothing or hold
            fewer blocks than may be selected.
    """
    check_score(score)
    shares: dict[str, Any] = dict(
        block_size=block_size, sink_blocks=sink_blocks, recent_blocks=recent_blocks, query_blocks=query_blocks,
        agnostic_blocks=agnostic_blocks, heat_decay=heat_decay, normalise=normalise, rule=rule, limit=limit,
    )  # fmt: skip
    if open_groups is not None:
        check_groups(score, rule, block_scores, selected_blocks, open_groups, group_blocks)
        assert q is not None and summary is not None and block_scores is not None and num_open is not None
        _choose_in_groups(
            q, summary, heat, seq_lens if due is None else seq_lens * due, host_table, block_scores, selected_blocks,
            num_selected, open_groups, num_open, group_blocks, seq_lens, softmax_scale, shares,
        )  # fmt: skip
    else:
        if score in SCORERS:
            assert q is not None and summary is not None and block_scores is not None
            SCORERS[score](
                q, summary, host_table, seq_lens if due is None else seq_lens * due, logits, arrivals, block_scores,
                softmax_scale=softmax_scale, block_size=block_size,
            )  # fmt: skip
        select(
            None if score == "none" else block_scores, heat, seq_lens, selected_blocks, num_selected,
            **shares, due=due,
        )  # fmt: skip
    resolve(
        selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base,
        slot_count, step, hit_slots, miss_slots, load_src, load_dst, load_at, load_count, counters,
        block_size=block_size, sink_blocks=sink_blocks, recent_blocks=recent_blocks,
    )  # fmt: skip


def check_score(score: str) -> None:
    """Raise ValueError for a `score` that no op knows."""
    if score not in (*SCORERS, "given", "none"):
        raise ValueError(f"score must be one of {[*SCORERS, 'given', 'none']}, not {score!r}")


def check_groups(
    score: str,
    rule: str,
    block_scores: Tensor | None,
    selected_blocks: Tensor,
    open_groups: Tensor,
    group_blocks: int,
) -> None:
    """Raise ValueError where groups mean nothing, or their lists do not go with the other arguments."""
    if score != "mean" or rule != "fixed":
        raise ValueError(f"open_groups goes with score 'mean' and rule 'fixed', not {score!r} and {rule!r}")
    listed, budget = open_groups.shape[2], selected_blocks.shape[2]
    if (listed - 1) * group_blocks + 1 < budget:
        raise ValueError(f"{listed} open groups of {group_blocks} blocks may hold fewer than {budget} blocks")
    if block_scores is None or block_scores.shape[2] != listed * group_blocks:
        raise ValueError(f"block_scores must hold the {listed * group_blocks} candidates of {listed} groups")


def _choose_in_groups(
    q: Tensor,
    summary: Tensor,
    heat: Tensor | None,
    due_lens: Tensor,
    host_table: Tensor,
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
    """Score and select among the candidates: every (row, head) is taken for a row of one head that holds only those.

    `due_lens` is 0 for rows that are inactive, or keep their lists.
    """
    heads, blocks, block_size = num_selected.shape[1], host_table.shape[1], shares["block_size"]
    tokens = block_size * group_blocks
    group = open_groups.long().repeat_interleave(group_blocks, 2)  # [B, Hkv, K * R], of every candidate
    ids = group * group_blocks + torch.arange(group.shape[2], device=q.device) % group_blocks
    # What does not exist shares one spare place.
    ids = torch.where((group < 0) | (ids >= blocks), blocks, ids)
    # The groups that are cut out all lie ahead of the tail, so a row is shorter by all their tokens.
    skipped = (due_lens[:, None] - 1) // tokens + 1 - num_open
    lens = torch.where(due_lens[:, None] > 0, due_lens[:, None] - skipped * tokens, 0).flatten().int()

    table = F.pad(host_table.clamp(min=0), (0, 1))[:, None].expand(-1, heads, -1)
    pages = table.gather(2, ids) * heads + torch.arange(heads, device=q.device)[:, None]
    scores = torch.empty_like(block_scores).flatten(0, 1)[:, None]
    score_mean(
        q.unflatten(1, (heads, -1)).flatten(0, 1), summary.flatten(0, 1)[:, None], pages.flatten(0, 1), lens,
        None, None, scores, softmax_scale=softmax_scale, block_size=block_size,
    )  # fmt: skip
    block_scores.copy_(scores.view_as(block_scores))

    padded = None if heat is None else F.pad(heat, (0, 1))
    own_heat = None if padded is None else padded.gather(2, ids).flatten(0, 1)[:, None]
    places = torch.empty_like(selected_blocks).flatten(0, 1)[:, None]
    count = torch.empty_like(num_selected).flatten()[:, None]
    select(scores, own_heat, lens, places, count, **shares)
    if heat is not None and padded is not None and own_heat is not None:
        heat.copy_(padded.scatter(2, ids, own_heat.view_as(ids))[..., :blocks])
    waits = ((seq_lens > 0) & (due_lens == 0))[:, None]
    places = places.view_as(selected_blocks)
    found = torch.where(places < 0, -1, ids.gather(2, places.clamp(min=0).long()))
    selected_blocks.copy_(torch.where(waits[..., None], selected_blocks, found))
    num_selected.copy_(torch.where(waits, num_selected, count.view_as(num_selected)))
