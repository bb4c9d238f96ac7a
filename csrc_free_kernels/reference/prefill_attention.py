"""Attention of a chunk of queries over one segment of keys, folded into a running result, in plain torch."""

import torch
from torch import Tensor


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    key_len: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
    bias: Tensor | None = None,
    bias_scale: float = 1.0,
) -> None:
    """Fold the causal attention of a query chunk over one key segment into `(out, lse)`.

    Args:
        q: [B, Hq, Q, D], any float dtype; query i is at query_start[b] + i. Negative positions see nothing.
        k: [B, Hkv, M, C', D]; key j is [j // C', j % C'] at position key_start[b] + j. Plain chunk: M = 1.
        v: [B, Hkv, M, C', D].
        query_start: int32 [B], positions.
        key_start: int32 [B], positions.
        key_len: int32 [B], keys of the segment that exist; those at negative positions do not. The rest may
            hold anything.
        out: fp32 (fp64 for fp64 inputs) [B, Hq, Q, D], the result so far (0 at first), updated in place.
        lse: [B, Hq, Q], natural log, the result so far (-inf at first), updated in place.
        softmax_scale: factor on q.k.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap).
        window: None, or a query sees only the last `window` positions up to its own.
        bias: [B, Hkv, M, C'] or None: a number per key; `bias_scale` times it is added to the (capped) logit.
        bias_scale: factor on the bias.
    """
    batch, num_q_heads, num_queries, head_dim = q.shape
    num_kv_heads = k.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    q = q.to(work).reshape(batch, num_kv_heads, -1, num_queries, head_dim)
    k, v = (x.flatten(2, 3).to(work) for x in (k, v))  # [B, Hkv, J, D]

    j = torch.arange(k.shape[2], device=q.device)
    key_pos = (key_start[:, None] + j)[:, None]  # [B, 1, J]
    query_pos = (query_start[:, None] + torch.arange(num_queries, device=q.device))[..., None]  # [B, Q, 1]
    exists = (j < key_len[:, None])[:, None] & (key_pos >= 0)
    seen = exists & (key_pos <= query_pos)
    if window is not None:
        seen = seen & (key_pos > query_pos - window)

    logits = softmax_scale * q @ k.transpose(-1, -2)[:, :, None]  # [B, Hkv, G, Q, J]
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias_scale * bias.flatten(2).to(work)[:, :, None, None]
    logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
    before = lse.unflatten(1, (num_kv_heads, -1))
    total = torch.logaddexp(before, torch.logsumexp(logits, -1))
    shift = total.masked_fill(total == -torch.inf, 0)
    v = v.masked_fill(~exists[:, 0, None, :, None], 0)[:, :, None]
    out.mul_(torch.exp(before - shift).flatten(1, 2)[..., None])
    out.add_((torch.exp(logits - shift[..., None]) @ v).flatten(1, 2))
    lse.copy_(total.flatten(1, 2))
