"""Triton `open_groups`: bounds of the groups by all programs of a (row, head), then the best by the last of them."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.score_mean import arrive
from csrc_free_kernels.gpu.select import LOWEST_KEY, best, sortable
from csrc_free_kernels.reference import open_groups as truth
from csrc_free_kernels.reference.open_groups import check_open_groups, keep_units

TILE = 32  # groups a program scores at once: 16 KiB of bf16 bounds at D = 128
PROGRAMS = 512  # programs worth launching, about 4 an SM
WARPS = 4
MAX_GROUPS = 32768
UNITS = tl.constexpr(2**truth.KEEP_BITS)


# Extremes of the mean keys of one group, read by page: values as they are stored, so that nothing is rounded.
@triton.jit
def keep_bounds(
    p_bounds, summary, p_table, i_h, stride_sp, stride_sh, stride_mw,
    BLOCKS: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, D_P)
    b_high = tl.full([D_P], float("-inf"), tl.float32)
    b_low = tl.full([D_P], float("inf"), tl.float32)
    for i in range(0, BLOCKS):
        b_page = tl.maximum(tl.load(p_table + i), 0).to(tl.int64)
        p_k = summary + b_page * stride_sp + i_h * stride_sh + o_d
        b_k = tl.load(p_k, mask=o_d < D, other=0.0).to(tl.float32)
        b_high, b_low = tl.maximum(b_high, b_k), tl.minimum(b_low, b_k)
    tl.store(p_bounds + o_d, b_high.to(p_bounds.dtype.element_ty), mask=o_d < D)
    tl.store(p_bounds + stride_mw + o_d, b_low.to(p_bounds.dtype.element_ty), mask=o_d < D)


# Grid (B * Hkv, splits).
# q [B, Hq, D], group_bounds [B, Hkv, M, 2, D] -> group_scores fp32, group_open uint8 [B, Hkv, M].
@triton.jit
def open_groups_kernel(
    q, group_bounds, summary, host_table, seq_lens, due, arrivals, group_scores, group_open,
    block_size, num_groups, keep, Hkv,
    stride_qb, stride_qh, stride_mb, stride_mh, stride_mg, stride_mw, stride_sp, stride_sh, stride_tb,
    BLOCKS: tl.constexpr, DUE: tl.constexpr, G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr,
    D_P: tl.constexpr, TILE: tl.constexpr, M_P: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_row // Hkv, i_row % Hkv
    seq_len = tl.load(seq_lens + i_b)
    span = block_size * BLOCKS
    complete = tl.minimum(seq_len // span, num_groups)
    num = tl.maximum(complete - 1, 0)
    is_due = seq_len > 0
    if DUE:
        is_due = is_due & (tl.load(due + i_b) != 0)
    p_bounds = group_bounds + i_b * stride_mb + i_h * stride_mh
    p_scores = group_scores + i_row * num_groups
    if (tl.program_id(1) == 0) & (seq_len > 0) & (seq_len % span == 0):
        # of the newest group, which is open: nobody reads its bounds in this step
        p_table = host_table + i_b * stride_tb + (complete - 1) * BLOCKS
        keep_bounds(
            p_bounds + (complete - 1).to(tl.int64) * stride_mg, summary, p_table, i_h, stride_sp, stride_sh, stride_mw,
            BLOCKS, D, D_P,
        )  # fmt: skip
    if is_due:
        o_g, o_d = tl.arange(0, G_P), tl.arange(0, D_P)
        m_g, m_d = (o_g < G)[:, None], (o_d < D)[None, :]
        p_q = q + i_b * stride_qb + (i_h * G + o_g)[:, None] * stride_qh + o_d[None, :]
        b_q = tl.load(p_q, mask=m_g & m_d, other=0.0).to(tl.float32)
        # as max >= min, max(q * max, q * min) is q+ * max + q- * min
        b_positive, b_negative = tl.maximum(b_q, 0.0), tl.minimum(b_q, 0.0)
        if not UPCAST_DOT:
            b_positive = b_positive.to(group_bounds.dtype.element_ty)
            b_negative = b_negative.to(group_bounds.dtype.element_ty)
        for i_start in range(tl.program_id(1) * TILE, num, tl.num_programs(1) * TILE):
            o_m = i_start + tl.arange(0, TILE)
            m_m = o_m < num
            p_high = p_bounds + o_m.to(tl.int64)[:, None] * stride_mg + o_d[None, :]
            b_high = tl.load(p_high, mask=m_m[:, None] & m_d, other=0.0)
            b_low = tl.load(p_high + stride_mw, mask=m_m[:, None] & m_d, other=0.0)
            if UPCAST_DOT:
                b_high, b_low = b_high.to(tl.float32), b_low.to(tl.float32)
            b_bound = tl.dot(b_positive, tl.trans(b_high), input_precision="ieee")
            b_bound = tl.dot(b_negative, tl.trans(b_low), b_bound, input_precision="ieee")
            tl.store(p_scores + o_m, tl.max(tl.where(m_g, b_bound, float("-inf")), axis=0), mask=m_m)
        if arrive(arrivals + i_row):
            tl.debug_barrier()  # what other threads of this program wrote is read next
            o_n = tl.arange(0, M_P)
            b_score = tl.load(p_scores + o_n, mask=o_n < num, other=float("-inf"))
            m_open = o_n >= num
            kept = ((num.to(tl.int64) * keep + (UNITS - 1)) // UNITS).to(tl.int32)
            if kept >= num:
                m_open = m_open | (o_n < num)
            else:
                m_open = m_open | best(tl.where(o_n < num, sortable(b_score), LOWEST_KEY), kept, M_P)
            tl.store(group_open + i_row * num_groups + o_n, m_open.to(tl.uint8), mask=o_n < num_groups)


def open_groups(
    q: Tensor,
    group_bounds: Tensor,
    summary: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    arrivals: Tensor,
    group_scores: Tensor,
    group_open: Tensor,
    *,
    block_size: int,
    group_blocks: int,
    keep: float,
    due: Tensor | None = None,
) -> None:
    """Mark the groups whose blocks are to be scored, and keep the bounds of a group that this token completes.

    Arguments as in `csrc_free_kernels/reference/open_groups.py`; the last dim of every tensor is contiguous, and
    `arrivals`, `group_scores` and `group_open` are contiguous. One launch on the current stream, no wait.

    Raises:
        ValueError: `keep` out of range, bounds that do not cover the table, a strided tensor, or more groups than a
            program can hold (32768).
    """
    check_open_groups(group_bounds, summary, host_table, group_blocks, keep)
    whole = (arrivals, group_scores, group_open)
    if not all(t.is_contiguous() for t in whole) or any(
        t.stride(-1) != 1 for t in (q, group_bounds, summary, host_table)
    ):
        raise ValueError("scratch and mask must be contiguous, and the last dim of every tensor")
    rows, heads, num_groups = group_open.shape
    if num_groups > MAX_GROUPS:
        raise ValueError(f"open_groups handles up to {MAX_GROUPS} groups, not {num_groups}")
    group, dim = q.shape[1] // heads, q.shape[2]
    splits = min(triton.cdiv(num_groups, TILE), triton.cdiv(PROGRAMS, rows * heads))
    open_groups_kernel[(rows * heads, splits)](
        q, group_bounds, summary, host_table, seq_lens, due, arrivals, group_scores, group_open,
        block_size, num_groups, keep_units(keep), heads,
        *q.stride()[:2], *group_bounds.stride()[:4], *summary.stride()[:2], host_table.stride(0),
        BLOCKS=group_blocks, DUE=due is not None, G=group, G_P=max(16, triton.next_power_of_2(group)), D=dim,
        D_P=triton.next_power_of_2(dim), TILE=TILE, M_P=triton.next_power_of_2(num_groups),
        UPCAST_DOT=not q.is_cuda, num_warps=WARPS,
    )  # fmt: skip
