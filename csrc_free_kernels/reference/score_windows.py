"""Truth of `score_windows`: blocks ranked by attention to overlapping half-block windows (InfLLM-V2)."""

from typing import Literal

import torch
from torch import Tensor

from csrc_free_kernels.reference.score_mean import unit_logits


def score_windows(
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
    pool: Literal["max", "overlap"] = "max",
) -> None:
    """Score blocks by the attention weights of the overlapping key windows that touch them.

    A window is the mean of two neighbouring sub-units, and its softmax is summed over the group. InfLLM-V2
    (arXiv:2509.24663, `max`): a block takes the maximum over its W + 1 windows. NSA (arXiv:2502.11089,
    `overlap`): their sum, each times the sub-units it has in the block, which is 1, 2, ..., 2, 1.

    Args:
        q: [B, Hq, D] after RoPE. Several queries may be folded into the group: Hq is any multiple of Hkv.
        summary: [P, Hkv, W, D] sub-unit means by host page; unfinished sub-units may hold anything.
        host_table: int32 [B, N].
        seq_lens: int32 [B], tokens.
        logits: scratch, not used here; may be None.
        arrivals: int32 [B, Hkv], for the Triton home only; may be None.
        block_scores: [B, Hkv, N], written in full: -inf where none of a block's windows exist.
        softmax_scale: factor on q.k.
        block_size: tokens in a block, a multiple of W.
        pool: how a block's windows are put together.
    """
    units_per_block = summary.shape[2]
    units = unit_logits(q, summary, host_table, softmax_scale).flatten(-2)  # [B, Hkv, G, N * W]
    windows = (units[..., :-1] + units[..., 1:]) / 2  # the mean of two keys has the mean of their logits
    finished = seq_lens // (block_size // units_per_block)
    exists = (torch.arange(windows.shape[-1], device=q.device) + 2 <= finished[:, None])[:, None]
    weights = windows.masked_fill(~exists[:, :, None], -torch.inf).softmax(-1)
    weights = weights.sum(2).masked_fill(~exists, -torch.inf)
    # window j sits at j + 1 after padding, so block n covers W * n .. W * n + W
    padded = torch.nn.functional.pad(weights, (1, 1), value=-torch.inf)
    touching = padded.unfold(-1, units_per_block + 1, units_per_block)  # [B, Hkv, N, W + 1]
    if pool == "max":
        block_scores.copy_(touching.amax(-1))
        return
    overlap = torch.full((units_per_block + 1,), 2.0, dtype=touching.dtype, device=q.device)
    overlap[0] = overlap[-1] = 1.0
    none = (touching == -torch.inf).all(-1)
    summed = (touching.clamp_min(0.0) * overlap).sum(-1)
    block_scores.copy_(summed.masked_fill(none, -torch.inf))
