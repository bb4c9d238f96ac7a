"""Truth of `score_minmax`: blocks ranked by the upper bound of their logits (Quest)."""

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
) -> None:
    """Score every closed block by an upper bound of its logits, the highest of the group.

    Quest (arXiv:2406.10774): sum over channels of max(q * max, q * min). As max >= min, that is the
    positive part of q against the maxima plus its negative part against the minima: two matrix products.

    Args:
        q: [B, Hq, D] after RoPE. Several queries may be folded into the group: Hq is any multiple of Hkv.
        summary: [P, Hkv, 2, D], channel-wise maxima, then minima, by host page; those of other than closed
            blocks may hold anything.
        host_table: int32 [B, N].
        seq_lens: int32 [B], tokens.
        logits: scratch, not used here; may be None.
        arrivals: int32 [B, Hkv], for the Triton home only; may be None.
        block_scores: [B, Hkv, N], written in full: raw bounds, -inf where the block is not closed.
        softmax_scale: factor on the bound, positive.
        block_size: tokens in a block.
    """
    keys = gather_summary(summary, host_table)
    q = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1)) * softmax_scale
    bounds = torch.einsum("bhgd,bhnd->bhgn", q.clamp(min=0), keys[..., 0, :])
    bounds = bounds + torch.einsum("bhgd,bhnd->bhgn", q.clamp(max=0), keys[..., 1, :])
    blocks = torch.arange(host_table.shape[1], device=q.device)
    closed = (blocks < (seq_lens // block_size)[:, None])[:, None]  # [B, 1, N]
    block_scores.copy_(bounds.amax(2).masked_fill(~closed, -torch.inf))
