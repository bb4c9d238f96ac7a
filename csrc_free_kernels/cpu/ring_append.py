"""Sliding-window layers: new tokens go into a ring buffer."""

import numba as nb
from torch import Tensor

from csrc_free_kernels.cpu.bits import as_numpy


# Serial: one token a row in decode, less than it costs to wake a thread.
@nb.njit(cache=True)
def ring_append_kernel(k, v, start, k_ring, v_ring):
    num_rows, num_kv_heads, num_tokens, head_dim = k.shape
    size = k_ring.shape[2]
    for b in range(num_rows):
        for h in range(num_kv_heads):
            for t in range(max(num_tokens - size, -start[b], 0), num_tokens):
                entry = (start[b] + t) % size
                for d in range(head_dim):
                    k_ring[b, h, entry, d] = k[b, h, t, d]
                    v_ring[b, h, entry, d] = v[b, h, t, d]


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
    ring_append_kernel(as_numpy(k), as_numpy(v), start.numpy(), as_numpy(k_ring), as_numpy(v_ring))
