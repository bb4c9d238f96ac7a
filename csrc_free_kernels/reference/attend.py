"""Partial attention of one decode step over selected KV blocks, in plain torch."""

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_ids: Tensor,
    block_slots: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
    bias_pool: Tensor | None = None,
    bias_scale: float = 1.0,
) -> None:
    """Attend to the blocks of each (row, KV head) that have a slot, in T splits that merge later.

    Args:
        q: [B, Hq, D], any float dtype.
        k_pool: [L, C, D], the dtype of q. Slots that are not named may hold anything.
        v_pool: [L, C, D].
        block_ids: int32 [B, Hkv, S], logical block ids, which fix the token positions.
        block_slots: int32 [B, Hkv, S], -1 = leave this entry out.
        seq_lens: int32 [B], tokens; 0 = the row has no keys.
        out: fp32 (fp64 for fp64 inputs) [T, B, Hq, D]; split t takes the entries s with s % T == t.
        lse: [T, B, Hq], natural log; a split without keys gets out 0 and lse -inf.
        softmax_scale: factor on q.k.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap).
        window: None, or only the last `window` tokens count.
        bias_pool: [L, C] or None: a number per token; `bias_scale` times it is added to the (capped) logit.
        bias_scale: factor on the bias.
    """
    (num_splits, batch, num_q_heads, head_dim), num_kv_heads = out.shape, block_ids.shape[1]
    block_size = k_pool.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    q = q.to(work).view(batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim)

    slots = block_slots.clamp(min=0).long()
    pos = block_ids[..., None] * block_size + torch.arange(block_size, device=q.device)  # [B, Hkv, S, C]
    seq_len = seq_lens.view(-1, 1, 1, 1)
    seen = (block_slots >= 0)[..., None] & (pos < seq_len)
    if window is not None:
        seen &= pos > seq_len - 1 - window

    for t in range(num_splits):
        m = seen[:, :, t::num_splits].flatten(2)  # [B, Hkv, keys]
        k = k_pool[slots[:, :, t::num_splits]].to(work).flatten(2, 3)
        v = v_pool[slots[:, :, t::num_splits]].to(work).flatten(2, 3).masked_fill(~m[..., None], 0)
        logits = softmax_scale * q @ k.transpose(-1, -2)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        if bias_pool is not None:
            bias = bias_pool[slots[:, :, t::num_splits]].to(work).flatten(2)
            logits = logits + bias_scale * bias[:, :, None]
        logits = logits.masked_fill(~m[:, :, None], -torch.inf)
        total = torch.logsumexp(logits, -1)  # [B, Hkv, G]
        weights = torch.exp(logits - total.masked_fill(total == -torch.inf, 0)[..., None])
        out[t] = (weights @ v).flatten(1, 2)
        lse[t] = total.flatten(1, 2)
