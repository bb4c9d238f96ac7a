"""Truth of `select`: which blocks a query attends to, and the heat that remembers past scores."""

import torch
from torch import Tensor

RULES = ("fixed", "scored", "threshold", "mass", "margin")
# A score weighs score / top score in units of 2^-26, rounded up: integers, which add up alike in any order. A share of
# all weights is a multiple of 2^-20, so that products stay below 2^63.
WEIGHT_BITS, LIMIT_BITS = 26, 20


def select(
    block_scores: Tensor | None,
    heat: Tensor | None,
    seq_lens: Tensor,
    selected_blocks: Tensor,
    num_selected: Tensor,
    *,
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
) -> None:
    """Select forced, best-scoring and hottest blocks of every (row, head), then update the heat.

    Args:
        block_scores: fp32 [B, Hkv, N], NaN counts as -inf; may be None when `query_blocks == 0` and
            `normalise == "none"`.
        heat: fp32 [B, Hkv, N], updated in place for the blocks that exist; may be None when
            `agnostic_blocks == 0` and `normalise == "none"`.
        seq_lens: int32 [B], tokens; 0 = inactive.
        selected_blocks: int32 [B, Hkv, S], written in full: ascending logical ids, then -1.
        num_selected: int32 [B, Hkv], written.
        block_size: tokens in a block.
        sink_blocks: blocks forced at the start.
        recent_blocks: blocks forced at the end, the tail included (at least 1).
        query_blocks: blocks taken by score.
        agnostic_blocks: blocks taken by heat among what is left.
        heat_decay: factor on the old heat.
        normalise: how scores enter the heat: "sum", "softmax" or "none" (heat is left unchanged).
        rule: how many blocks are taken by score: "fixed" (`query_blocks`), or at most as many: "scored" (all with
            a finite score), "threshold", "mass" or "margin".
        limit: least share of a block's score, share of all scores to reach, or distance from the best score.
        due: int32 [B], active rows at 0 keep what the lists hold, and their heat; None: every row is due.

    Raises:
        ValueError: an unknown `normalise` or `rule`, a limit out of range, or scores or heat are needed and not
            given.
    """
    check_arguments(block_scores, heat, query_blocks, agnostic_blocks, normalise, rule, limit)
    if due is not None:
        waits = ((due == 0) & (seq_lens > 0))[:, None, None]
        before = [t if t is None else t.clone() for t in (selected_blocks, num_selected[..., None], heat)]
    width, device = selected_blocks.shape[2], selected_blocks.device
    nb = ((seq_lens + block_size - 1) // block_size)[:, None, None]  # [B, 1, 1]
    if rule != "fixed" and block_scores is not None:
        block = torch.arange(block_scores.shape[2], device=device)
        chosen = ((block < sink_blocks) | (block >= nb - recent_blocks)) & (block < nb)
        chosen = chosen.expand_as(block_scores)
        scored = block_scores.isfinite() & (block < nb)
        count = _allowance(block_scores.float(), scored, chosen, rule, limit).clamp(max=query_blocks)
        chosen = chosen | _best(block_scores, scored & ~chosen, count)
        if agnostic_blocks and heat is not None:
            chosen = chosen | _best(heat, scored & ~chosen, agnostic_blocks)
        _compact(chosen, selected_blocks, num_selected)
    elif query_blocks + agnostic_blocks == 0:
        place = torch.arange(width, device=device)
        in_front = (nb <= width) | (place < sink_blocks)
        ids = torch.where(in_front, place, place - sink_blocks + nb - recent_blocks)
        count = torch.where(nb <= width, nb, sink_blocks + recent_blocks)
        selected_blocks.copy_(torch.where(place < count, ids, -1))
        num_selected.copy_(count[..., 0])
    else:
        rankings = ((block_scores, query_blocks), (heat, agnostic_blocks))
        used = [(values, share) for values, share in rankings if values is not None and share > 0]
        block = torch.arange(used[0][0].shape[2], device=device)
        forced = (block < sink_blocks) | (block >= nb - recent_blocks) | (nb <= width)
        chosen = (forced & (block < nb)).expand_as(used[0][0])
        open_to_choice = (block < nb) & (nb > width)
        for values, share in used:
            chosen = chosen | _best(values, open_to_choice & ~chosen, share)
        _compact(chosen, selected_blocks, num_selected)
    if normalise != "none" and block_scores is not None and heat is not None:
        _update_heat(block_scores, heat, nb, heat_decay, normalise)
    if due is not None:
        for now, old in zip((selected_blocks, num_selected[..., None], heat), before, strict=True):
            if now is not None and old is not None:
                now.copy_(torch.where(waits, old, now))


def check_arguments(
    block_scores: Tensor | None,
    heat: Tensor | None,
    query_blocks: int,
    agnostic_blocks: int,
    normalise: str,
    rule: str = "fixed",
    limit: float = 0.0,
) -> None:
    """Raise ValueError for an unknown word, a limit out of range, or scores or heat needed and not given."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, not {rule!r}")
    if rule != "fixed" and query_blocks == 0:
        raise ValueError(f"rule {rule!r} says how many of query_blocks are taken, which is 0")
    if rule in ("threshold", "mass") and not 0 <= limit <= 1 or rule == "margin" and not limit >= 0:
        raise ValueError(f"rule {rule!r} has no limit {limit}")
    if normalise not in ("sum", "softmax", "none"):
        raise ValueError(f"normalise must be 'sum', 'softmax' or 'none', not {normalise!r}")
    if block_scores is None and (query_blocks > 0 or normalise != "none"):
        raise ValueError(f"query_blocks = {query_blocks}, normalise = {normalise!r} need block_scores")
    if heat is None and (agnostic_blocks > 0 or normalise != "none"):
        raise ValueError(f"agnostic_blocks = {agnostic_blocks}, normalise = {normalise!r} need heat")


def limit_of(rule: str, limit: float) -> int | float:
    """Return the limit as kernels take it: a share in units of 2^-LIMIT_BITS, a margin as it is."""
    return round(limit * 2**LIMIT_BITS) if rule in ("threshold", "mass") else limit


def _allowance(scores: Tensor, scored: Tensor, forced: Tensor, rule: str, limit: float) -> Tensor:
    """Return how many blocks a rule takes by score, int64 [B, Hkv, 1]; scores fp32, `scored` the finite ones."""
    candidate = scored & ~forced
    top = scores.masked_fill(~scored, -torch.inf).amax(-1, keepdim=True)
    if rule == "scored":
        return candidate.sum(-1, keepdim=True)
    if rule == "margin":
        return (candidate & (scores > top - limit)).sum(-1, keepdim=True)
    weighs = scored & (scores > 0)
    weight = torch.ceil(torch.where(weighs, scores / top, 0.0) * 2.0**WEIGHT_BITS).long()
    share = weight.sum(-1, keepdim=True) * int(limit_of(rule, limit))
    if rule == "threshold":
        return (candidate & (weight > share >> LIMIT_BITS)).sum(-1, keepdim=True)
    needed = (share + 2**LIMIT_BITS - 1 >> LIMIT_BITS) - (weight * forced).sum(-1, keepdim=True)
    falling = (weight * candidate).sort(dim=-1, descending=True).values
    return (falling.cumsum(-1) - falling < needed).sum(-1, keepdim=True)


def _best(values: Tensor, candidate: Tensor, count: int | Tensor) -> Tensor:
    """Mark the `count` largest candidates, ties to the lower id."""
    values = torch.where(values.isnan(), -torch.inf, values) + 0.0  # -0.0 ties with 0.0
    order = values.sort(dim=-1, descending=True, stable=True).indices
    candidate = candidate.gather(-1, order)
    taken = candidate & (candidate.cumsum(-1) <= count)
    return torch.zeros_like(taken).scatter(-1, order, taken)


def _compact(chosen: Tensor, selected_blocks: Tensor, num_selected: Tensor) -> None:
    """Write the ids of the marked blocks in ascending order, padded with -1, and their number."""
    width = selected_blocks.shape[2]
    place = torch.where(chosen, chosen.cumsum(-1) - 1, width)  # unmarked blocks share one spare place
    ids = torch.arange(chosen.shape[2], dtype=torch.int32, device=chosen.device).expand_as(chosen)
    spare = torch.full((*chosen.shape[:2], width + 1), -1, dtype=torch.int32, device=chosen.device)
    selected_blocks.copy_(spare.scatter(-1, place, ids)[..., :width])
    num_selected.copy_(chosen.sum(-1))


def _update_heat(block_scores: Tensor, heat: Tensor, nb: Tensor, heat_decay: float, normalise: str) -> None:
    """Fold the normalised scores into the heat of existing blocks."""
    exists = torch.arange(heat.shape[2], device=heat.device) < nb
    finite = exists & block_scores.isfinite()
    if normalise == "softmax":
        share = block_scores.masked_fill(~finite, -torch.inf).softmax(-1)
    else:
        total = block_scores.masked_fill(~finite, 0.0).sum(-1, keepdim=True)
        share = block_scores / torch.where(total == 0, 1.0, total)
    new = heat_decay * heat + torch.where(finite, share, 0.0)
    heat.copy_(torch.where(exists, new, heat))
