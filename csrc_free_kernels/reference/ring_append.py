"""Sliding-window layers: new tokens go into a ring buffer."""

import torch
from torch import Tensor


def ring_append(k: Tensor, v: Tensor, start: Tensor, k_ring: Tensor, v_ring: Tensor) -> None:
    """Write token `i` of every row (position `p = start[b] + i`) to ring entry `p % R`.

    Tokens at negative positions and all but the last R tokens of the chunk are dropped.

    Args:
        k: [B, Hkv, Q, D], any float dtype.
        v: [B, Hkv, Q, D].
        start: int32 [B], tokens.
        k_ring: [B, Hkv, R, D], written in place.
        v_ring: [B, Hkv, R, D], written in place.
    """
    size, length = k_ring.shape[2], k.shape[2]
    for b, first in enumerate(start.tolist()):
        tokens = torch.arange(min(max(-first, length - size, 0), length), length, device=k.device)
        entries = (first + tokens) % size
        k_ring[b, :, entries] = k[b, :, tokens]
        v_ring[b, :, entries] = v[b, :, tokens]
