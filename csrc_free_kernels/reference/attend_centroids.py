"""Estimated attention over the closed blocks that a step did not select, in plain torch."""

import math

import torch
from torch import Tensor

from csrc_free_kernels.reference.score_mean import gather_summary


def attend_centroids(
    q: Tensor,
    mean_k: Tensor,
    mean_v: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    selected_blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    block_size: int,
) -> None:
    """Attend to the closed blocks that are not selected, each sub-unit as if all its tokens were their mean.

    The estimation zone of RetroInfer (arXiv:2505.02922, microsoft/RetrievalAttention), with blocks in place of
    clusters: a sub-unit of U tokens has the logit of its mean key plus log U, and its mean value.

    Args:
        q: [B, Hq, D] after RoPE, any float dtype.
        mean_k: [P, Hkv, W, D] means of U = block_size / W keys by host page; of other than closed blocks anything.
        mean_v: [P, Hkv, W, D] means of the values.
        host_table: int32 [B, N].
        seq_lens: int32 [B], tokens; 0 = the row has no keys.
        selected_blocks: int32 [B, Hkv, S], ascending ids padded with -1: the blocks to leave out.
        out: fp32 (fp64 for fp64 inputs) [T, B, Hq, D]; split t takes the blocks n with n % T == t.
        lse: [T, B, Hq], natural log; a split without blocks gets out 0 and lse -inf.
        softmax_scale: factor on q.k.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap), before log U is added.
        block_size: tokens in a block.
    """
    num_splits, units = out.shape[0], mean_k.shape[2]
    keys, values = gather_summary(mean_k, host_table), gather_summary(mean_v, host_table)  # [B, Hkv, N, W, D]
    logits = softmax_scale * torch.einsum(
        "bhgd,bhnwd->bhgnw", q.to(keys.dtype).unflatten(1, (keys.shape[1], -1)), keys
    )
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    blocks = torch.arange(host_table.shape[1], device=q.device)
    closed = (blocks < (seq_lens // block_size)[:, None])[:, None]  # [B, 1, N]
    estimated = closed & ~(selected_blocks[..., None] == blocks).any(2)  # [B, Hkv, N]
    logits = logits + math.log(block_size // units)
    logits = logits.masked_fill(~estimated[:, :, None, :, None], -torch.inf)
    values = values.masked_fill(~estimated[..., None, None], 0)
    for t in range(num_splits):
        x, v = logits[..., t::num_splits, :].flatten(-2), values[:, :, t::num_splits].flatten(2, 3)
        total = torch.logsumexp(x, -1)  # [B, Hkv, G]
        weights = torch.exp(x - total.masked_fill(total == -torch.inf, 0)[..., None])
        out[t] = (weights @ v).flatten(1, 2)
        lse[t] = total.flatten(1, 2)
