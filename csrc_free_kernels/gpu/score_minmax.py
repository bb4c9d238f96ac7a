"""Triton `score_minmax`: upper bounds of the blocks' logits (Quest) as two matrix products."""

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.reference.score_minmax import check_minmax

TILE = 64  # blocks a program scores at once: 16 KiB each of maxima and minima in bf16 at D = 128
PROGRAMS = 512  # programs worth launching, about 4 an SM: small batches are split over the blocks
WARPS = 4


# Bounds of the blocks of one (row, head), tiles dealt out to the splits.
# q [B, Hq, D], summary [P, Hkv, W, D], host_table [B, N] -> block_scores fp32 [B, Hkv, N].
# As max >= min, max(q * max, q * min) is q+ * max + q- * min: no [G, TILE, D] product is needed.
@triton.jit
def bounds(
    q, summary, host_table, seq_len, block_scores, softmax_scale, num_blocks, block_size, i_b, i_h,
    stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_bb, stride_bh,
    G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, BY_MEAN: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    num_closed = tl.minimum(seq_len // block_size, num_blocks)
    o_g = tl.arange(0, G_P)
    o_d = tl.arange(0, D_P)
    m_g = (o_g < G)[:, None]
    m_d = (o_d < D)[None, :]
    p_q = q + i_b * stride_qb + (i_h * G + o_g)[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_g & m_d, other=0.0).to(tl.float32)
    b_positive = tl.maximum(b_q, 0.0)
    b_negative = tl.minimum(b_q, 0.0)
    if not UPCAST_DOT:
        b_positive = b_positive.to(summary.dtype.element_ty)
        b_negative = b_negative.to(summary.dtype.element_ty)
    for i_start in range(tl.program_id(1) * TILE, num_blocks, tl.num_programs(1) * TILE):
        o_n = i_start + tl.arange(0, TILE)
        m_n = o_n < num_closed
        b_page = tl.load(host_table + i_b * stride_tb + o_n, mask=m_n, other=0)
        b_page = tl.maximum(b_page, 0).to(tl.int64)
        p_max = summary + b_page[:, None] * stride_sp + i_h * stride_sh + o_d[None, :]
        b_score = tl.full([TILE], float("-inf"), tl.float32)
        for i_w in range(0, W, 2):
            b_high = tl.load(p_max + i_w * stride_sw, mask=m_n[:, None] & m_d, other=0.0)
            b_low = tl.load(p_max + (i_w + 1) * stride_sw, mask=m_n[:, None] & m_d, other=0.0)
            if UPCAST_DOT:
                b_high = b_high.to(tl.float32)
                b_low = b_low.to(tl.float32)
            b_bound = tl.dot(b_positive, tl.trans(b_high), input_precision="ieee")
            b_bound = tl.dot(b_negative, tl.trans(b_low), b_bound, input_precision="ieee") * softmax_scale
            if BY_MEAN:
                b_group = tl.sum(tl.where(m_g, b_bound, 0.0), axis=0) / G
            else:
                b_group = tl.max(tl.where(m_g, b_bound, float("-inf")), axis=0)
            b_score = tl.maximum(b_score, b_group)
        b_score = tl.where(m_n, b_score, float("-inf"))
        tl.store(block_scores + i_b * stride_bb + i_h * stride_bh + o_n, b_score, mask=o_n < num_blocks)


# Grid (B * Hkv, splits).
@triton.jit
def score_minmax_kernel(
    q, summary, host_table, seq_lens, block_scores, softmax_scale, num_blocks, block_size, Hkv,
    stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_bb, stride_bh,
    G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, BY_MEAN: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // Hkv).to(tl.int64)
    i_h = (tl.program_id(0) % Hkv).to(tl.int64)
    bounds(
        q, summary, host_table, tl.load(seq_lens + i_b), block_scores, softmax_scale, num_blocks, block_size, i_b, i_h,
        stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_bb, stride_bh,
        G, G_P, D, D_P, W, TILE, BY_MEAN, UPCAST_DOT,
    )  # fmt: skip


def score_minmax(
    q: Tensor,
    summary: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    logits: Tensor | None,
    arrivals: Tensor | None,
    block_scores: Tensor,
    *,
    softmax_scale: float,
    block_size: int,
    group_by: Literal["max", "mean"] = "max",
) -> None:
    """Score every closed block by an upper bound of its logits: of a sub-unit over the group, then the best sub-unit.

    Arguments as in `csrc_free_kernels/reference/score_minmax.py`; the last dim of every tensor is contiguous,
    `logits` and `arrivals` are not used. One launch on the current stream, no wait.

    Raises:
        ValueError: a last dim is strided, `summary` does not hold maxima and minima, or another `group_by`.
    """
    check_minmax(summary, group_by)
    for t in (q, summary, host_table, block_scores):
        if t.stride(-1) != 1:
            raise ValueError(f"the last dim must be contiguous; strides are {t.stride()}")
    num_rows, num_kv_heads, num_blocks = block_scores.shape
    group, head_dim = q.shape[1] // num_kv_heads, q.shape[2]
    programs = num_rows * num_kv_heads
    splits = min(triton.cdiv(num_blocks, TILE), triton.cdiv(PROGRAMS, programs))
    score_minmax_kernel[(programs, splits)](
        q, summary, host_table, seq_lens, block_scores, softmax_scale, num_blocks, block_size, num_kv_heads,
        q.stride(0), q.stride(1), *summary.stride()[:3], host_table.stride(0), *block_scores.stride()[:2],
        G=group, G_P=max(16, triton.next_power_of_2(group)), D=head_dim, D_P=triton.next_power_of_2(head_dim),
        W=summary.shape[2], TILE=TILE, BY_MEAN=group_by == "mean", UPCAST_DOT=not q.is_cuda, num_warps=WARPS,
    )  # fmt: skip
