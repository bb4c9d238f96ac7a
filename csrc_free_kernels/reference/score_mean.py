"""Truth of `score_mean`: blocks ranked by attention to their mean key."""

import torch
from torch import Tensor


def score_mean(
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
    """Score every closed block by the softmax of its mean key, averaged over the group's query heads.

    Args:
        q: [B, Hq, D] after RoPE. Several queries may be folded into the group: Hq is any multiple of Hkv.
        summary: [P, Hkv, 1, D] mean keys by host page; those of other than closed blocks may hold anything.
        host_table: int32 [B, N].
        seq_lens: int32 [B], tokens.
        logits: scratch, not used here; may be None.
        arrivals: int32 [B, Hkv], for the Triton home only; may be None.
        block_scores: [B, Hkv, N], written in full: probabilities, -inf where the block is not closed.
        softmax_scale: factor on q.k.
        block_size: tokens in a block.
    """
    logits = unit_logits(q, summary, host_table, softmax_scale).squeeze(-1)  # [B, Hkv, G, N]
    blocks = torch.arange(host_table.shape[1], device=q.device)
    closed = (blocks < (seq_lens // block_size)[:, None])[:, None]  # [B, 1, N]
    weights = logits.masked_fill(~closed[:, :, None], -torch.inf).softmax(-1)
    block_scores.copy_(weights.mean(2).masked_fill(~closed, -torch.inf))


def unit_logits(q: Tensor, summary: Tensor, host_table: Tensor, softmax_scale: float) -> Tensor:
    """Return softmax_scale * q . summary as [B, Hkv, G, N, W], in fp32 (fp64 where the summary is)."""
    keys = gather_summary(summary, host_table)
    q = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1))
    return torch.einsum("bhgd,bhnwd->bhgnw", q * softmax_scale, keys)


def gather_summary(summary: Tensor, host_table: Tensor) -> Tensor:
    """Return the summaries of every logical block, [B, Hkv, N, W, D]; no page stands for scratch page 0."""
    dtype = torch.float64 if summary.dtype == torch.float64 else torch.float32
    return summary[host_table.clamp(min=0).long()].transpose(1, 2).to(dtype)
