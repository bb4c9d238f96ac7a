"""How the weights of a step's attention are spread over the blocks it attended to, in plain torch."""

import torch
from torch import Tensor


def block_mass(
    q: Tensor,
    k_pool: Tensor,
    block_ids: Tensor,
    block_slots: Tensor,
    seq_lens: Tensor,
    lse: Tensor,
    mass: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
) -> None:
    """Sum the attention weights of every block that has a slot, averaged over the group's query heads.

    Weights are relative to `lse`; over all keys that it counts they sum to 1.

    Args:
        q: [B, Hq, D], any float dtype.
        k_pool: [L, C, D], the dtype of q. Slots that are not named may hold anything.
        block_ids: int32 [B, Hkv, S], logical block ids, which fix the token positions.
        block_slots: int32 [B, Hkv, S], -1 = leave this entry out.
        seq_lens: int32 [B], tokens; 0 = the row has no keys.
        lse: fp32 (fp64 for fp64 inputs) [B, Hq], natural log, finite where a key counts.
        mass: like lse, [B, Hkv, S], written in full; 0 where an entry is left out.
        softmax_scale: factor on q.k.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap).
    """
    heads, size = block_ids.shape[1], k_pool.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    q, lse = q.to(work).unflatten(1, (heads, -1)), lse.unflatten(1, (heads, -1))
    k = k_pool[block_slots.clamp(min=0).long()].to(work)  # [B, Hkv, S, C, D]
    logits = softmax_scale * torch.einsum("bhgd,bhscd->bhgsc", q, k)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    pos = block_ids[..., None] * size + torch.arange(size, device=q.device)
    seen = (block_slots >= 0)[..., None] & (pos < seq_lens.view(-1, 1, 1, 1))  # [B, Hkv, S, C]
    weights = torch.exp(logits - lse[..., None, None])
    mass.copy_(torch.where(seen[:, :, None], weights, 0.0).sum(-1).mean(2))
