"""Rotary position embedding of queries and keys in place, their per-head norms in front, in plain torch."""

import torch
from torch import Tensor

from csrc_free_kernels.reference.rms_norm import normed


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 0.0,
    offset: int = 0,
) -> None:
    """Rotate the halves of every head of `q` and `k` in place.

    Args:
        q: [T, Hq, D], overwritten.
        k: [T, Hkv, D], overwritten.
        cos: [A, R], R <= D even; T is a multiple of A and token t takes row t % A. Channels from R on pass through.
        sin: [A, R].
        q_weight: [D] or None: RMS norm of every query head ahead of the rotation (then R == D), as `rms_norm`.
        k_weight: [D], with `q_weight`.
        eps: of the norms.
        offset: of the norms.
    """
    cos, sin = (t.repeat(q.shape[0] // t.shape[0], 1)[:, None] for t in (cos, sin))
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            x.copy_(normed(x, weight, eps, offset))
        turned = x[..., : cos.shape[-1]]
        first, second = turned.chunk(2, -1)
        turned.copy_(turned * cos + torch.cat((-second, first), -1) * sin)
