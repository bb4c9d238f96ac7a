"""Summaries of the sub-units and blocks that a chunk of prompt tokens completed."""

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.reference.summarize_chunk import unit_tokens

TILE_ROWS = 16  # keys folded at a time: 16 fp32 registers a thread at D = 128
NUM_WARPS = 4


@triton.jit
def start_summary(D_P2: tl.constexpr, KIND: tl.constexpr):
    """The empty accumulators [D_P2]: the sum or maximum, and the minimum (unused for `mean`)."""
    b_low = tl.full((D_P2,), float("inf"), tl.float32)
    b_high = tl.full((D_P2,), 0.0 if KIND == "mean" else -float("inf"), tl.float32)
    return b_high, b_low


@triton.jit
def next_pass(b_high, b_low):
    """The accumulators of the second pass over the keys of a cuboid: the centre, and no distances from it yet."""
    return (b_high + b_low) * 0.5, tl.zeros_like(b_low)


@triton.jit
def fold_keys(b_high, b_low, b_keys, KIND: tl.constexpr, i_pass: tl.constexpr):
    """Fold keys [rows, D_P2] fp32 into the accumulators."""
    if KIND == "mean":
        b_high += tl.sum(b_keys, axis=0)
    elif i_pass == 1:
        b_low += tl.sum(tl.abs(b_keys - b_high[None, :]), axis=0)
    else:
        b_high = tl.maximum(b_high, tl.max(b_keys, axis=0))
        b_low = tl.minimum(b_low, tl.min(b_keys, axis=0))
    return b_high, b_low


@triton.jit
def store_summary(
    p_summary,
    b_high,
    b_low,
    i_unit,
    stride_w,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,
    KIND: tl.constexpr,
):
    """Write what stands for sub-unit `i_unit` of one page and head, summary [W, D]: a vector (`mean`) or two."""
    o_d = tl.arange(0, D_P2)
    dtype = p_summary.dtype.element_ty
    if KIND == "mean":
        tl.store(p_summary + i_unit * stride_w + o_d, (b_high * (1.0 / UNIT)).to(dtype), mask=o_d < D)
    else:
        if KIND == "cuboid":
            b_radius = b_low * (1.0 / UNIT)
            b_low = b_high - b_radius
            b_high += b_radius
        p_unit = p_summary + 2 * i_unit * stride_w + o_d
        tl.store(p_unit, b_high.to(dtype), mask=o_d < D)
        tl.store(p_unit + stride_w, b_low.to(dtype), mask=o_d < D)


# grid (B * HKV, units); a program computes the i-th unit that the chunk may have completed
@triton.jit
def summarize_chunk_kernel(
    k,  # [B, HKV, Q, D]
    start,  # [B]
    host_table,  # [B, N]
    k_host,  # [P, HKV, C, D]
    summary,  # [P, HKV, W, D]
    num_tokens,  # Q
    stride_k_row,
    stride_k_head,
    stride_k_token,
    stride_table,
    stride_page,
    stride_head,
    stride_host_token,
    stride_s_page,
    stride_s_head,
    stride_s_w,
    HKV: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
):
    i_b, i_h = (tl.program_id(0) // HKV).to(tl.int64), (tl.program_id(0) % HKV).to(tl.int64)
    first = tl.load(start + i_b)
    begin = (tl.maximum(first, 0) // UNIT + tl.program_id(1)) * UNIT
    if begin + UNIT <= first + num_tokens:
        page = tl.load(host_table + i_b * stride_table + begin // C).to(tl.int64)
        p_k = k + i_b * stride_k_row + i_h * stride_k_head
        p_host = k_host + page * stride_page + i_h * stride_head
        o_d = tl.arange(0, D_P2)
        b_high, b_low = start_summary(D_P2, KIND)
        for i_pass in tl.static_range(2 if KIND == "cuboid" else 1):
            if i_pass == 1:
                b_high, b_low = next_pass(b_high, b_low)
            for i_row in range(0, UNIT, ROWS):
                position = begin + i_row + tl.arange(0, ROWS)
                m_new = (position >= first)[:, None] & (o_d < D)[None, :]
                m_old = (position < first)[:, None] & (o_d < D)[None, :]
                o_new = (position - first).to(tl.int64) * stride_k_token
                o_old = (position % C).to(tl.int64) * stride_host_token
                b_new = tl.load(p_k + o_new[:, None] + o_d[None, :], mask=m_new, other=0.0).to(tl.float32)
                b_old = tl.load(p_host + o_old[:, None] + o_d[None, :], mask=m_old, other=0.0).to(tl.float32)
                b_high, b_low = fold_keys(b_high, b_low, b_new + b_old, KIND, i_pass)
        p_summary = summary + page * stride_s_page + i_h * stride_s_head
        store_summary(p_summary, b_high, b_low, begin % C // UNIT, stride_s_w, UNIT, D, D_P2, KIND)


def summarize_chunk(
    k: Tensor,
    start: Tensor,
    host_table: Tensor,
    k_host: Tensor,
    summary: Tensor,
    *,
    summary_kind: Literal["mean", "minmax", "cuboid"],
) -> None:
    """Compute every summary entry whose last token lies in `[max(start, 0), start + Q)`.

    Runs on the current stream, after the `append_chunk` of the same tokens.

    Args:
        k: [B, Hkv, Q, D], the chunk, last dim contiguous; negative positions are padding.
        start: int32 [B], tokens.
        host_table: int32 [B, N].
        k_host: [P, Hkv, C, D], pinned host memory; tokens before `start` are read from it.
        summary: [P, Hkv, W, D], written in place; other entries are left alone.
        summary_kind: `mean` (sub-units of C / W tokens), `minmax` or `cuboid` (of 2C / W tokens).
    """
    assert k.stride(3) == k_host.stride(3) == summary.stride(3) == 1
    rows, heads, num_tokens, dim = k.shape
    block_size = k_host.shape[2]
    unit = unit_tokens(summary_kind, block_size, summary.shape[2])
    summarize_chunk_kernel[(rows * heads, triton.cdiv(num_tokens, unit))](
        k,
        start,
        host_table,
        k_host,
        summary,
        num_tokens,
        *k.stride()[:3],
        host_table.stride(0),
        *k_host.stride()[:3],
        *summary.stride()[:3],
        HKV=heads,
        C=block_size,
        UNIT=unit,
        D=dim,
        D_P2=triton.next_power_of_2(dim),
        ROWS=min(unit, TILE_ROWS),
        KIND=summary_kind,
        num_warps=NUM_WARPS,
    )
