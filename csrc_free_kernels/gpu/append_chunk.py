"""A chunk of prompt tokens: write-through to the host, and to the pool where a block is resident."""

import triton
import triton.language as tl
from torch import Tensor

# 32 tokens a tile: 16-byte stores of whole rows, four of them a thread at D = 128 in 16 bits
TILE_TOKENS = 32
NUM_WARPS = 4


# grid (B * HKV, token tiles); a program writes one tile of tokens of one (row, head)
@triton.jit
def append_chunk_kernel(
    k,  # [B, HKV, Q, D]
    v,
    start,  # [B]
    host_table,  # [B, N]
    k_host,  # [P, HKV, C, D]
    v_host,
    k_pool,  # [L, C, D]
    v_pool,
    slot_of,  # [B, HKV, N]
    num_tokens,  # Q
    stride_k_row,
    stride_k_head,
    stride_k_token,
    stride_v_row,
    stride_v_head,
    stride_v_token,
    stride_table,
    stride_page,
    stride_head,
    stride_host_token,
    stride_slot,
    stride_pool_token,
    stride_slot_row,
    stride_slot_head,
    HKV: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,
    TILE: tl.constexpr,
):
    i_b, i_h = (tl.program_id(0) // HKV).to(tl.int64), (tl.program_id(0) % HKV).to(tl.int64)
    o_token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    o_d = tl.arange(0, D_P2)
    position = tl.load(start + i_b) + o_token
    m_token = (o_token < num_tokens) & (position >= 0)
    block, offset = position // C, (position % C).to(tl.int64)
    page = tl.load(host_table + i_b * stride_table + block, mask=m_token, other=0).to(tl.int64)
    slot = tl.load(
        slot_of + i_b * stride_slot_row + i_h * stride_slot_head + block, mask=m_token, other=-1
    ).to(tl.int64)
    o_host = page * stride_page + i_h * stride_head + offset * stride_host_token
    o_pool = slot * stride_slot + offset * stride_pool_token

    m_new = m_token[:, None] & (o_d < D)[None, :]
    m_pool = m_new & (slot >= 0)[:, None]
    o_token = o_token.to(tl.int64)
    o_k = i_b * stride_k_row + i_h * stride_k_head + o_token * stride_k_token
    o_v = i_b * stride_v_row + i_h * stride_v_head + o_token * stride_v_token
    b_k = tl.load(k + o_k[:, None] + o_d[None, :], mask=m_new, other=0.0)
    b_v = tl.load(v + o_v[:, None] + o_d[None, :], mask=m_new, other=0.0)
    tl.store(k_host + o_host[:, None] + o_d[None, :], b_k, mask=m_new)
    tl.store(v_host + o_host[:, None] + o_d[None, :], b_v, mask=m_new)
    tl.store(k_pool + o_pool[:, None] + o_d[None, :], b_k, mask=m_pool)
    tl.store(v_pool + o_pool[:, None] + o_d[None, :], b_v, mask=m_pool)


def append_chunk(
    k: Tensor,
    v: Tensor,
    start: Tensor,
    host_table: Tensor,
    k_host: Tensor,
    v_host: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_of: Tensor,
) -> None:
    """Write token `i` of every row to position `start[b] + i`; negative positions are padding and dropped.

    Runs on the current stream; the host pages are written by the kernel itself.

    Args:
        k: [B, Hkv, Q, D], last dim contiguous.
        v: [B, Hkv, Q, D], last dim contiguous.
        start: int32 [B], tokens.
        host_table: int32 [B, N]; every block that gets a token has a page.
        k_host: [P, Hkv, C, D], pinned host memory, written in place.
        v_host: [P, Hkv, C, D], pinned host memory, written in place, strided as `k_host`.
        k_pool: [L, C, D], written in place where `slot_of >= 0`.
        v_pool: [L, C, D], likewise, strided as `k_pool`.
        slot_of: int32 [B, Hkv, N], not changed.
    """
    assert k_host.stride() == v_host.stride() and k_pool.stride() == v_pool.stride()
    assert k.stride(3) == v.stride(3) == k_host.stride(3) == k_pool.stride(2) == 1
    rows, heads, num_tokens, dim = k.shape
    append_chunk_kernel[(rows * heads, triton.cdiv(num_tokens, TILE_TOKENS))](
        k,
        v,
        start,
        host_table,
        k_host,
        v_host,
        k_pool,
        v_pool,
        slot_of,
        num_tokens,
        *k.stride()[:3],
        *v.stride()[:3],
        host_table.stride(0),
        *k_host.stride()[:3],
        *k_pool.stride()[:2],
        *slot_of.stride()[:2],
        HKV=heads,
        C=k_host.shape[2],
        D=dim,
        D_P2=triton.next_power_of_2(dim),
        TILE=TILE_TOKENS,
        num_warps=NUM_WARPS,
    )
