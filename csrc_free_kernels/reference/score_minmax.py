"""Truth of `score_minmax`: blocks ranked by the upper bound of their logits (Quest)."""

from typing import Literal

import torch
from torch import Tensor

from csrc_free_kernels.reference.score_mean import gather_summary


def score_minmax(
    q: Tensor,
    summary: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    logits: Tensor | None,
    arrivals: Tensor | None,
    block_scores: Tensor,
    *,
    softmax_scale: float,
    block_size: int,
    group_by: Literal["max", "mean"] = "max",
) -> None:
    """Score every closed block by an upper bound of its logits: of a sub-unit over the group, then the best sub-unit.

    Quest (arXiv:2406.10774): sum over channels of max(q * max, q * min). As max >= min, that is the
    positive part of q against the maxima plus its negative part against the minima: two matrix products.
    Sub-units smaller than the block are LServe's logical pages (arXiv:2502.14866).

    Args:
        q: [B, Hq, D] after RoPE. Several queries may be folded into the group: Hq is any multiple of Hkv.
        summary: [P, Hkv, W, D], for each of W / 2 sub-units channel-wise maxima, then minima, by host page;
            those of other than closed blocks may hold anything.
        host_table: int32 [B, N].
        seq_lens: int32 [B], tokens.
        logits: scratch, not used here; may be None.
        arrivals: int32 [B, Hkv], for the Triton home only; may be None.
        block_scores: [B, Hkv, N], written in full: raw bounds, -inf where the block is not closed.
        softmax_scale: factor on the bound, positive.
        block_size: tokens in a block.
        group_by: what becomes of the bounds of a group's query heads.

    Raises:
        ValueError: `summary` does not hold maxima and minima, or another `group_by`.
    """
    check_minmax(summary, group_by)
    keys = gather_summary(summary, host_table)
    q = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1)) * softmax_scale
    bounds = torch.einsum("bhgd,bhnud->bhgnu", q.clamp(min=0), keys[..., 0::2, :])
    bounds = bounds + torch.einsum("bhgd,bhnud->bhgnu", q.clamp(max=0), keys[..., 1::2, :])
    of_group = bounds.amax(2) if group_by == "max" else bounds.mean(2)  # [B, Hkv, N, U]
    blocks = torch.arange(host_table.shape[1], device=q.device)
    closed = (blocks < (seq_lens // block_size)[:, None])[:, None]  # [B, 1, N]
    block_scores.copy_(of_group.amax(-1).masked_fill(~closed, -torch.inf))


def check_minmax(summary: Tensor, group_by: str) -> None:
    """Raise ValueError unless the summary holds pairs of vectors and `group_by` is known."""
    if summary.shape[2] < 2 or summary.shape[2] % 2:
        raise ValueError(f"score_minmax takes maxima and minima, not {summary.shape[2]} vectors a block")
    if group_by not in ("max", "mean"):
        raise ValueError(f"group_by must be max or mean, not {group_by!r}")
