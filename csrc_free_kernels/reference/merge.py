"""Merging partial attention results by log-sum-exp, in plain torch."""

import torch
from torch import Tensor


def merge(
    out_parts: Tensor,
    lse_parts: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    splits: int | None = None,
    late_slots: Tensor | None = None,
) -> None:
    """Combine partial attentions over disjoint sets of keys into the attention over their union.

    Args:
        out_parts: fp32 or fp64 [T, B, Hq, D], each part normalised over its own keys.
        lse_parts: [T, B, Hq], natural log; -inf marks a part without keys, whose out is not read.
        sinks: [Hq] or None: an extra logit a head that takes weight but has no value.
        out: [B, Hq, D] in the model's dtype; 0 where there are no keys.
        lse: [B, Hq] or None to skip; of the keys alone, without the sink; -inf where there are none.
        splits, late_slots: None, or how many parts there always are, and the slots int32 [B, Hkv, S] of loaded blocks
            (-1: not loaded): of the parts from `splits` on only those exist that `attend_loads` wrote for these.
    """
    if late_slots is not None and splits is not None:
        group, late = out.shape[1] // late_slots.shape[1], late_parts_of(late_slots, len(out_parts) - splits)
        last = (splits + late).repeat_interleave(group, 1)
        there = torch.arange(len(out_parts), device=last.device)[:, None, None] < last
        lse_parts = lse_parts.masked_fill(~there, -torch.inf)
    keys = torch.logsumexp(lse_parts, 0)  # [B, Hq]
    total = keys if sinks is None else torch.logaddexp(keys, sinks.to(keys.dtype))
    weights = torch.exp(lse_parts - total.masked_fill(total == -torch.inf, 0))[..., None]
    out.copy_((weights * out_parts.masked_fill(weights == 0, 0)).sum(0))
    if lse is not None:
        lse.copy_(keys)


def blocks_per_part(blocks: int, parts: int) -> int:
    """Return how many of up to `blocks` loaded blocks share a part: ranks g * i .. g * (i + 1) - 1 have part i."""
    return -(-blocks // parts)


def late_parts_of(late_slots: Tensor, parts: int) -> Tensor:
    """Return how many of `parts` parts the loaded blocks of every (row, KV head) take, int32 [B, Hkv]."""
    per_part = blocks_per_part(late_slots.shape[2], parts)
    return ((late_slots >= 0).sum(-1) + per_part - 1).div(per_part, rounding_mode="floor").int()
