"""Sliding-window layers: new tokens go into a ring buffer."""

import triton
import triton.language as tl
from torch import Tensor

TILE_TOKENS = 16  # one tile is the whole launch of a decode step
NUM_WARPS = 4


# grid (B * HKV, token tiles); a program writes one tile of tokens of one (row, head)
@triton.jit
def ring_append_kernel(
    k,  # [B, HKV, Q, D]
    v,
    start,  # [B]
    k_ring,  # [B, HKV, R, D]
    v_ring,
    first_token,  # tokens before it are overwritten by later ones of the same chunk
    num_tokens,  # Q
    size,  # R
    stride_k_row,
    stride_k_head,
    stride_k_token,
    stride_v_row,
    stride_v_head,
    stride_v_token,
    stride_ring_row,
    stride_ring_head,
    stride_ring_token,
    HKV: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,
    TILE: tl.constexpr,
):
    i_b, i_h = (tl.program_id(0) // HKV).to(tl.int64), (tl.program_id(0) % HKV).to(tl.int64)
    o_token = first_token + tl.program_id(1) * TILE + tl.arange(0, TILE)
    o_d = tl.arange(0, D_P2)
    position = tl.load(start + i_b) + o_token
    m_new = ((o_token < num_tokens) & (position >= 0))[:, None] & (o_d < D)[None, :]
    o_token = o_token.to(tl.int64)
    o_k = i_b * stride_k_row + i_h * stride_k_head + o_token * stride_k_token
    o_v = i_b * stride_v_row + i_h * stride_v_head + o_token * stride_v_token
    o_ring = (
        i_b * stride_ring_row + i_h * stride_ring_head + (position % size).to(tl.int64) * stride_ring_token
    )
    b_k = tl.load(k + o_k[:, None] + o_d[None, :], mask=m_new, other=0.0)
    b_v = tl.load(v + o_v[:, None] + o_d[None, :], mask=m_new, other=0.0)
    tl.store(k_ring + o_ring[:, None] + o_d[None, :], b_k, mask=m_new)
    tl.store(v_ring + o_ring[:, None] + o_d[None, :], b_v, mask=m_new)


def ring_append(k: Tensor, v: Tensor, start: Tensor, k_ring: Tensor, v_ring: Tensor) -> None:
    """Write token `i` of every row (position `p = start[b] + i`) to ring entry `p % R`.

    Tokens at negative positions and all but the last R tokens of the chunk are dropped. Runs on the
    current stream.

    Args:
        k: [B, Hkv, Q, D], last dim contiguous.
        v: [B, Hkv, Q, D], last dim contiguous.
        start: int32 [B], tokens.
        k_ring: [B, Hkv, R, D], written in place, last dim contiguous.
        v_ring: [B, Hkv, R, D], written in place, strided as `k_ring`.
    """
    assert k_ring.stride() == v_ring.stride() and k.stride(3) == v.stride(3) == k_ring.stride(3) == 1
    rows, heads, num_tokens, dim = k.shape
    size = k_ring.shape[2]
    ring_append_kernel[(rows * heads, triton.cdiv(min(num_tokens, size), TILE_TOKENS))](
        k,
        v,
        start,
        k_ring,
        v_ring,
        max(num_tokens - size, 0),
        num_tokens,
        size,
        *k.stride()[:3],
        *v.stride()[:3],
        *k_ring.stride()[:3],
        HKV=heads,
        D=dim,
        D_P2=triton.next_power_of_2(dim),
        TILE=TILE_TOKENS,
        num_warps=NUM_WARPS,
    )
