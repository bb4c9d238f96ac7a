"""Triton `open_groups`: bounds and heat of the groups by all programs of a (row, head), the choice by the last."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.score_mean import arrive
from csrc_free_kernels.gpu.select import select_blocks
from csrc_free_kernels.reference.open_groups import check_open_groups

TILE = 32  # groups a program scores at once: 16 KiB of bf16 bounds at D = 128
PROGRAMS = 512  # programs worth launching, about 4 an SM
MAX_GROUPS = 8192
GROUPS_PER_WARP = 64
LEAST_WARPS = 4


# Extremes of the mean keys of one group, read by page: values as they are stored, so that nothing is rounded.
@triton.jit
def keep_bounds(
    p_bounds, summary, p_table, i_h, stride_sp, stride_sh, stride_mw,
    R: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, D_P)
    b_high = tl.full([D_P], float("-inf"), tl.float32)
    b_low = tl.full([D_P], float("inf"), tl.float32)
    for i in range(0, R):
        b_page = tl.maximum(tl.load(p_table + i), 0).to(tl.int64)
        p_k = summary + b_page * stride_sp + i_h * stride_sh + o_d
        b_k = tl.load(p_k, mask=o_d < D, other=0.0).to(tl.float32)
        b_high, b_low = tl.maximum(b_high, b_k), tl.minimum(b_low, b_k)
    tl.store(p_bounds + o_d, b_high.to(p_bounds.dtype.element_ty), mask=o_d < D)
    tl.store(p_bounds + stride_mw + o_d, b_low.to(p_bounds.dtype.element_ty), mask=o_d < D)


# Heat of the hottest block of every group, and upper bounds of the logits of the first `num` groups (-inf for the
# others), tiles dealt out to the splits. As max >= min, max(q * max, q * min) is q+ * max + q- * min.
@triton.jit
def rate_groups(
    q, p_bounds, p_heat, p_scores, p_hottest, num, num_blocks, num_groups, i_b, i_h,
    stride_qb, stride_qh, stride_mg, stride_mw,
    QUERY: tl.constexpr, AGNOSTIC: tl.constexpr, R: tl.constexpr, G: tl.constexpr, G_P: tl.constexpr,
    D: tl.constexpr, D_P: tl.constexpr, TILE: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    o_g, o_d, o_r = tl.arange(0, G_P), tl.arange(0, D_P), tl.arange(0, R)
    m_g, m_d = (o_g < G)[:, None], (o_d < D)[None, :]
    if QUERY > 0:
        p_q = q + i_b * stride_qb + (i_h * G + o_g)[:, None] * stride_qh + o_d[None, :]
        b_q = tl.load(p_q, mask=m_g & m_d, other=0.0).to(tl.float32)
        b_positive, b_negative = tl.maximum(b_q, 0.0), tl.minimum(b_q, 0.0)
        if not UPCAST_DOT:
            b_positive = b_positive.to(p_bounds.dtype.element_ty)
            b_negative = b_negative.to(p_bounds.dtype.element_ty)
    for i_start in range(tl.program_id(1) * TILE, num_groups, tl.num_programs(1) * TILE):
        o_m = i_start + tl.arange(0, TILE)
        if AGNOSTIC > 0:
            o_n = o_m[:, None] * R + o_r[None, :]
            b_heat = tl.load(p_heat + o_n, mask=o_n < num_blocks, other=float("-inf"))
            tl.store(p_hottest + o_m, tl.max(b_heat, axis=1), mask=o_m < num_groups)
        if QUERY > 0:
            m_m = o_m < num
            p_high = p_bounds + o_m.to(tl.int64)[:, None] * stride_mg + o_d[None, :]
            b_high = tl.load(p_high, mask=m_m[:, None] & m_d, other=0.0)
            b_low = tl.load(p_high + stride_mw, mask=m_m[:, None] & m_d, other=0.0)
            if UPCAST_DOT:
                b_high, b_low = b_high.to(tl.float32), b_low.to(tl.float32)
            b_bound = tl.dot(b_positive, tl.trans(b_high), input_precision="ieee")
            b_bound = tl.dot(b_negative, tl.trans(b_low), b_bound, input_precision="ieee")
            b_bound = tl.max(tl.where(m_g, b_bound, float("-inf")), axis=0)
            tl.store(p_scores + o_m, tl.where(m_m, b_bound, float("-inf")), mask=o_m < num_groups)


# Grid (B * Hkv, splits). Shapes as in the contract; M_P and K_P are M and K rounded up to powers of two.
@triton.jit
def open_groups_kernel(
    q, group_bounds, summary, heat, host_table, seq_lens, due, arrivals, group_scores, open_groups, num_open,
    block_size, num_groups, num_blocks, Hkv,
    stride_qb, stride_qh, stride_mb, stride_mh, stride_mg, stride_mw, stride_sp, stride_sh, stride_tb,
    stride_hb, stride_hh,
    SINK: tl.constexpr, RECENT: tl.constexpr, QUERY: tl.constexpr, AGNOSTIC: tl.constexpr, R: tl.constexpr,
    DUE: tl.constexpr, G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    TILE: tl.constexpr, K: tl.constexpr, K_P: tl.constexpr, M_P: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_row // Hkv, i_row % Hkv
    seq_len = tl.load(seq_lens + i_b)
    span = block_size * R
    complete = tl.minimum(seq_len // span, num_groups)
    p_bounds = group_bounds + i_b * stride_mb + i_h * stride_mh
    if (tl.program_id(1) == 0) & (seq_len > 0) & (seq_len % span == 0):
        # of the newest group, which is open in any case: nobody reads its bounds in this step
        p_table = host_table + i_b * stride_tb + (complete - 1) * R
        keep_bounds(
            p_bounds + (complete - 1).to(tl.int64) * stride_mg, summary, p_table, i_h, stride_sp, stride_sh,
            stride_mw, R, D, D_P,
        )  # fmt: skip
    is_due = True
    if DUE:
        is_due = (tl.load(due + i_b) != 0) | (seq_len == 0)
    if is_due:
        existing = (seq_len + span - 1) // span
        p_scores = group_scores + i_row * 2 * num_groups
        p_hottest = p_scores + num_groups
        rate_groups(
            q, p_bounds, heat + i_b * stride_hb + i_h * stride_hh if AGNOSTIC > 0 else heat, p_scores, p_hottest,
            tl.maximum(tl.minimum(complete, existing - RECENT), 0),
            tl.minimum((seq_len + block_size - 1) // block_size, num_blocks), num_groups, i_b, i_h,
            stride_qb, stride_qh, stride_mg, stride_mw, QUERY, AGNOSTIC, R, G, G_P, D, D_P, TILE, UPCAST_DOT,
        )  # fmt: skip
        if arrive(arrivals + i_row):
            tl.debug_barrier()  # what other threads of this program wrote is read next
            o_m = tl.arange(0, M_P)
            b_score, b_heat = tl.zeros([M_P], tl.float32), tl.zeros([M_P], tl.float32)
            if QUERY > 0:
                b_score = tl.load(p_scores + o_m, mask=o_m < num_groups, other=float("-inf"))
            if AGNOSTIC > 0:
                b_heat = tl.load(p_hottest + o_m, mask=o_m < num_groups, other=float("-inf"))
            select_blocks(
                b_score, b_heat, existing, 0, host_table, open_groups + i_row * K, num_open + i_row,
                SINK, RECENT, QUERY, AGNOSTIC, "fixed", 1, K, K_P, M_P,
            )  # fmt: skip


def open_groups(
    q: Tensor,
    group_bounds: Tensor,
    summary: Tensor,
    heat: Tensor | None,
    host_table: Tensor,
    seq_lens: Tensor,
    arrivals: Tensor,
    group_scores: Tensor,
    open_groups: Tensor,
    num_open: Tensor,
    *,
    block_size: int,
    group_blocks: int,
    sink_groups: int,
    recent_groups: int,
    query_groups: int,
    agnostic_groups: int,
    due: Tensor | None = None,
) -> None:
    """List the groups whose blocks are to be scored, and keep the bounds of a group that this token completes.

    Arguments as in `csrc_free_kernels/reference/open_groups.py`; the last dim of every tensor is contiguous, and
    `arrivals`, `group_scores` and the lists are contiguous. One launch on the current stream, no wait.

    Raises:
        ValueError: as the reference, a strided tensor, or more groups than a program can hold (8192).
    """
    shares = (sink_groups, recent_groups, query_groups, agnostic_groups)
    check_open_groups(group_bounds, summary, heat, host_table, open_groups, group_blocks, shares)
    whole = (arrivals, group_scores, open_groups, num_open)
    given = [t for t in (q, group_bounds, summary, host_table, heat) if t is not None]
    if not all(t.is_contiguous() for t in whole) or any(t.stride(-1) != 1 for t in given):
        raise ValueError("scratch and lists must be contiguous, and the last dim of every tensor")
    rows, heads, _, num_groups = group_scores.shape
    if num_groups > MAX_GROUPS:
        raise ValueError(f"open_groups handles up to {MAX_GROUPS} groups, not {num_groups}")
    group, dim, width = q.shape[1] // heads, q.shape[2], open_groups.shape[2]
    splits = max(1, min(triton.cdiv(num_groups, TILE), triton.cdiv(PROGRAMS, rows * heads)))
    padded = triton.next_power_of_2(num_groups)
    open_groups_kernel[(rows * heads, splits)](
        q, group_bounds, summary, heat, host_table, seq_lens, due, arrivals, group_scores, open_groups, num_open,
        block_size, num_groups, host_table.shape[1], heads,
        *q.stride()[:2], *group_bounds.stride()[:4], *summary.stride()[:2], host_table.stride(0),
        *(heat.stride()[:2] if heat is not None else (0, 0)),
        SINK=sink_groups, RECENT=recent_groups, QUERY=query_groups, AGNOSTIC=agnostic_groups, R=group_blocks,
        DUE=due is not None, G=group, G_P=max(16, triton.next_power_of_2(group)), D=dim,
        D_P=triton.next_power_of_2(dim), TILE=TILE, K=width, K_P=triton.next_power_of_2(width), M_P=padded,
        UPCAST_DOT=not q.is_cuda,
        num_warps=max(LEAST_WARPS, min(16, padded // GROUPS_PER_WARP)),
    )  # fmt: skip
