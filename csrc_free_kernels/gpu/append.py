"""One new token a row: write-through, the tail block's slot, its summary."""

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.summarize_chunk import (
    TILE_ROWS,
    fold_keys,
    next_pass,
    start_summary,
    store_summary,
)
from csrc_free_kernels.gpu.victims import id_range_of, oldest_slot
from csrc_free_kernels.reference.summarize_chunk import unit_tokens

TILE_SLOTS = 256  # slots looked at together when one must be given up, once in C tokens
NUM_WARPS = 4


@triton.jit
def claim_slot(
    p_slot_of, block_in, last_used, base, count, step, block, sink_blocks, id_range, TILE: tl.constexpr
):
    """Take the first victim for `block` and update the tables; returns its slot or -1."""
    slot = oldest_slot(block_in, last_used, base, count, step, block, sink_blocks, id_range, TILE)
    if slot >= 0:
        old = tl.load(block_in + slot)
        tl.debug_barrier()  # every warp has read the tables before any warp changes them
        tl.store(p_slot_of + old, -1, mask=old >= 0)
        tl.store(p_slot_of + block, slot.to(tl.int32))
        tl.store(block_in + slot, block)
    return slot


@triton.jit
def copy_rows(p_src, p_dst, num, strides, D: tl.constexpr, D_P2: tl.constexpr, ROWS: tl.constexpr):
    """Copy rows `0 .. num - 1` of [C, D]; strides of source and destination rows."""
    o_d = tl.arange(0, D_P2)
    for i_row in range(0, num, ROWS):
        o_row = i_row + tl.arange(0, ROWS)
        m_row = (o_row < num)[:, None] & (o_d < D)[None, :]
        b_row = tl.load(p_src + o_row[:, None] * strides[0] + o_d[None, :], mask=m_row, other=0.0)
        tl.store(p_dst + o_row[:, None] * strides[1] + o_d[None, :], b_row, mask=m_row)


@triton.jit
def summarize_tail(
    p_keys, p_summary, offset, stride_token, stride_w, UNIT: tl.constexpr, D: tl.constexpr,
    D_P2: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Write what the token at `offset` completes: keys or values [C, D] of one block -> summary [W, D]."""
    if (offset + 1) % UNIT == 0:
        tl.debug_barrier()  # the rows read here were written by other threads of this program
        o_d = tl.arange(0, D_P2)
        b_high, b_low = start_summary(D_P2, KIND)
        for i_pass in tl.static_range(2 if KIND == "cuboid" else 1):
            if i_pass == 1:
                b_high, b_low = next_pass(b_high, b_low)
            for i_row in range(0, UNIT, ROWS):
                o_row = offset + 1 - UNIT + i_row + tl.arange(0, ROWS)
                p_row = p_keys + o_row[:, None] * stride_token + o_d[None, :]
                b_row = tl.load(p_row, mask=(o_d < D)[None, :], other=0.0).to(tl.float32)
                b_high, b_low = fold_keys(b_high, b_low, b_row, KIND, i_pass)
        store_summary(p_summary, b_high, b_low, offset // UNIT, stride_w, UNIT, D, D_P2, KIND)


# grid (B * HKV,); a program appends the token of one (row, head)
@triton.jit
def append_kernel(
    k_new,  # [B, HKV, D]
    v_new,
    seq_lens,  # [B]
    host_table,  # [B, N]
    k_host,  # [P, HKV, C, D]
    v_host,
    k_pool,  # [L, C, D]
    v_pool,
    slot_of,  # [B, HKV, N]
    block_in,  # [L]
    last_used,  # [L]
    slot_base,  # [B, HKV]
    slot_count,  # [B, HKV]
    step,  # [1]
    summary,  # [P, HKV, W, D] or None
    value_summary,  # [P, HKV, W', D] or None
    load_count,  # [1]
    bias_new,  # [B, HKV] or None, as the next two
    bias_host,  # [P, HKV, C]
    bias_pool,  # [L, C]
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_table,
    stride_page,
    stride_head,
    stride_host_token,
    stride_slot,
    stride_pool_token,
    stride_slot_row,
    stride_slot_head,
    stride_s_page,
    stride_s_head,
    stride_s_w,
    stride_vs_page,
    stride_vs_head,
    stride_vs_w,
    stride_b_row,
    stride_b_head,
    stride_b_page,
    stride_b_host_head,
    stride_b_slot,
    sink_blocks,
    id_range,
    HKV: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    V_UNIT: tl.constexpr,
    D: tl.constexpr,
    D_P2: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    i_bh = tl.program_id(0)
    if i_bh == 0:
        tl.store(load_count, 0)
    i_b, i_h = (i_bh // HKV).to(tl.int64), (i_bh % HKV).to(tl.int64)
    # loads that need no table first, so that they are under way together
    seq_len = tl.load(seq_lens + i_b)
    this_step = tl.load(step)
    o_d = tl.arange(0, D_P2)
    m_d = o_d < D
    b_k = tl.load(k_new + i_b * stride_k_row + i_h * stride_k_head + o_d, mask=m_d, other=0.0)
    b_v = tl.load(v_new + i_b * stride_v_row + i_h * stride_v_head + o_d, mask=m_d, other=0.0)
    if seq_len > 0:
        block, offset = (seq_len - 1) // C, (seq_len - 1) % C
        page = tl.load(host_table + i_b * stride_table + block).to(tl.int64)
        p_slot_of = slot_of + i_b * stride_slot_row + i_h * stride_slot_head
        slot = tl.load(p_slot_of + block).to(tl.int64)
        o_host = page * stride_page + i_h * stride_head
        o_token = offset * stride_host_token + o_d
        tl.store(k_host + o_host + o_token, b_k, mask=m_d)
        tl.store(v_host + o_host + o_token, b_v, mask=m_d)
        if HAS_BIAS:
            b_bias = tl.load(bias_new + i_b * stride_b_row + i_h * stride_b_head)
            p_bias_host = bias_host + page * stride_b_page + i_h * stride_b_host_head
            tl.store(p_bias_host + offset, b_bias)
        if slot < 0:
            base, count = tl.load(slot_base + i_bh), tl.load(slot_count + i_bh)
            slot = claim_slot(
                p_slot_of, block_in, last_used, base, count, this_step, block, sink_blocks, id_range, SLOTS
            )
            if slot >= 0:
                p_k, p_v = k_pool + slot * stride_slot, v_pool + slot * stride_slot
                strides = (stride_host_token, stride_pool_token)
                copy_rows(k_host + o_host, p_k, offset, strides, D, D_P2, ROWS)
                copy_rows(v_host + o_host, p_v, offset, strides, D, D_P2, ROWS)
                if HAS_BIAS:
                    copy_rows(p_bias_host, bias_pool + slot * stride_b_slot, offset, (1, 1), 1, 1, ROWS)
        if slot >= 0:
            p_keys = k_pool + slot * stride_slot
            o_token = offset * stride_pool_token + o_d
            tl.store(p_keys + o_token, b_k, mask=m_d)
            tl.store(v_pool + slot * stride_slot + o_token, b_v, mask=m_d)
            tl.store(last_used + slot, this_step)
            if HAS_BIAS:
                tl.store(bias_pool + slot * stride_b_slot + offset, b_bias)
            if KIND != "none":
                p_summary = summary + page * stride_s_page + i_h * stride_s_head
                summarize_tail(
                    p_keys, p_summary, offset, stride_pool_token, stride_s_w, UNIT, D, D_P2, ROWS, KIND
                )
            if V_UNIT:
                p_values = v_pool + slot * stride_slot
                p_summary = value_summary + page * stride_vs_page + i_h * stride_vs_head
                summarize_tail(
                    p_values, p_summary, offset, stride_pool_token, stride_vs_w, V_UNIT, D, D_P2, ROWS, "mean"
                )


def append(
    k_new: Tensor,
    v_new: Tensor,
    seq_lens: Tensor,
    host_table: Tensor,
    k_host: Tensor,
    v_host: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_of: Tensor,
    block_in: Tensor,
    last_used: Tensor,
    slot_base: Tensor,
    slot_count: Tensor,
    step: Tensor,
    summary: Tensor | None,
    load_count: Tensor,
    *,
    sink_blocks: int,
    summary_kind: Literal["none", "mean", "minmax", "cuboid"],
    value_summary: Tensor | None = None,
    bias_new: Tensor | None = None,
    bias_host: Tensor | None = None,
    bias_pool: Tensor | None = None,
) -> None:
    """Write the token at position `seq_len - 1` of every active row to its host page and to the pool.

    Runs on the current stream; the kernel itself writes the host pages and reads an absent tail block.

    Args:
        k_new: [B, Hkv, D], last dim contiguous.
        v_new: [B, Hkv, D], last dim contiguous.
        seq_lens: int32 [B], tokens, the new one included; 0 = inactive.
        host_table: int32 [B, N]; the tail block of an active row has a page.
        k_host: [P, Hkv, C, D], pinned host memory.
        v_host: [P, Hkv, C, D], pinned host memory, strided as `k_host`.
        k_pool: [L, C, D].
        v_pool: [L, C, D], strided as `k_pool`.
        slot_of: int32 [B, Hkv, N].
        block_in: int32 [L].
        last_used: int32 [L].
        slot_base: int32 [B, Hkv], contiguous.
        slot_count: int32 [B, Hkv], contiguous.
        step: int32 [1].
        summary: [P, Hkv, W, D], or None for kind `none`. Only the completed entries are written.
        load_count: int32 [1], set to 0.
        sink_blocks: blocks below this number are never evicted.
        summary_kind: what `summary` holds.
        value_summary: [P, Hkv, W, D] means of the values of every sub-unit of C / W tokens, or None for none.
        bias_new: [B, Hkv], a bias per token that is kept beside K and V; None with the next two where there is none.
        bias_host: [P, Hkv, C], pinned host memory, last dim contiguous.
        bias_pool: [L, C], last dim contiguous.
    """
    assert k_host.stride() == v_host.stride() and k_pool.stride() == v_pool.stride()
    assert k_new.stride(2) == v_new.stride(2) == k_host.stride(3) == k_pool.stride(2) == 1
    bias_strides = (0,) * 5
    if bias_new is not None:
        assert bias_host is not None and bias_pool is not None
        assert bias_host.stride(2) == bias_pool.stride(1) == 1
        bias_strides = (*bias_new.stride(), *bias_host.stride()[:2], bias_pool.stride(0))
    rows, heads, dim = k_new.shape
    block_size = k_pool.shape[1]
    unit = block_size if summary is None else unit_tokens(summary_kind, block_size, summary.shape[2])
    value_unit = 0 if value_summary is None else block_size // value_summary.shape[2]
    append_kernel[(rows * heads,)](
        k_new,
        v_new,
        seq_lens,
        host_table,
        k_host,
        v_host,
        k_pool,
        v_pool,
        slot_of,
        block_in,
        last_used,
        slot_base,
        slot_count,
        step,
        summary,
        value_summary,
        load_count,
        bias_new,
        bias_host,
        bias_pool,
        *k_new.stride()[:2],
        *v_new.stride()[:2],
        host_table.stride(0),
        *k_host.stride()[:3],
        *k_pool.stride()[:2],
        *slot_of.stride()[:2],
        *(summary.stride()[:3] if summary is not None else (0, 0, 0)),
        *(value_summary.stride()[:3] if value_summary is not None else (0, 0, 0)),
        *bias_strides,
        sink_blocks,
        id_range_of(slot_of, block_in),
        HKV=heads,
        C=block_size,
        UNIT=unit,
        V_UNIT=value_unit,
        D=dim,
        D_P2=triton.next_power_of_2(dim),
        ROWS=min(unit, value_unit or unit, TILE_ROWS),
        SLOTS=TILE_SLOTS,
        KIND=summary_kind,
        HAS_BIAS=bias_new is not None,
        num_warps=NUM_WARPS,
    )
