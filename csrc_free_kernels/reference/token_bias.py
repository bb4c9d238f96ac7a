"""Truth of `token_bias`: a learned number per token and KV head, from the token's values."""

import torch
from torch import Tensor


def token_bias(v: Tensor, weight: Tensor, offset: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Compute `scale * softplus(weight v + offset)`, v being the values of all KV heads of a token in a row.

    The head of NOSA (arXiv:2510.13602, thunlp/NOSA) and DMA (arXiv:2508.02124, SmallDoges/flash-dmattn).

    Args:
        v: [B, Hkv, Q, D], any float dtype.
        weight: [Hkv, Hkv * D], the dtype of v.
        offset: [Hkv] or None, the dtype of v.
        scale: [Hkv], fp32 (fp64 for fp64 values).
        out: [B, Hkv, Q], the dtype of v; rounded once.
    """
    work = torch.promote_types(v.dtype, torch.float32)
    joined = v.transpose(1, 2).flatten(2).to(work)  # [B, Q, Hkv * D]
    x = torch.nn.functional.linear(joined, weight.to(work), None if offset is None else offset.to(work))
    out.copy_((scale * torch.nn.functional.softplus(x)).transpose(1, 2))
