"""Root-mean-square norm with the residual add in front of it, in plain torch."""

import torch
from torch import Tensor


def normed(x: Tensor, weight: Tensor, eps: float, offset: int) -> Tensor:
    """Return x [..., H] over its root mean square, times the weight [H], rounded where the model rounds."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * (offset + weight.to(wide.dtype))).to(x.dtype)
    return weight * wide.to(x.dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    *,
    eps: float,
    offset: int,
    residual: Tensor | None = None,
    multiplier: float = 1.0,
    branch_weight: Tensor | None = None,
) -> None:
    """Normalise rows, after adding them to the residual stream if there is one.

    Args:
        x: [T, H]; with `residual` it is overwritten by the new residual stream.
        weight: [H] or None: no norm at the end.
        out: [T, H] in x's dtype, or None with `weight`.
        eps: added to the mean square.
        offset: 0: the normed row is rounded to x's dtype, then times weight (Llama); 1: times 1 + weight in fp32, then
            rounded (Gemma).
        residual: [T, H] or None; only read.
        multiplier: factor on x ahead of the add (Granite).
        branch_weight: [H] or None: norm of x ahead of the add (Gemma's sandwich).
    """
    if branch_weight is not None:
        x.copy_(normed(x, branch_weight, eps, offset))
    if residual is not None:
        x.copy_(residual + (x if multiplier == 1.0 else x * multiplier))
    if weight is not None and out is not None:
        out.copy_(normed(x, weight, eps, offset))
