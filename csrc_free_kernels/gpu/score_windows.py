"""Triton `score_windows`: raw logits of all sub-unit means, softmax over windows, maximum or sum per block."""

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.score_mean import (
    LOWEST,
    WARPS,
    finish_softmax,
    online_softmax,
    score_launch,
    unit_logits,
)


# Softmax over the windows of one (row, head), summed over the group, maximum (OVERLAP: weighted sum) per block.
# A window's logit is the mean of those of its two sub-units.
# logits fp32 [B, Hq, N * W] -> block_scores fp32 [B, Hkv, N].
@triton.jit
def pool_windows(
    p_logits, p_scores, num_units, num_blocks, stride_lh,
    G: tl.constexpr, G_P: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr = False,
):  # fmt: skip
    o_g = tl.arange(0, G_P)
    o_tile = tl.arange(0, TILE)
    m_g = (o_g < G)[:, None]
    p_rows = p_logits + o_g[:, None] * stride_lh
    b_max = tl.full([G_P, TILE], LOWEST, tl.float32)
    b_sum = tl.zeros([G_P, TILE], tl.float32)
    for i_start in range(0, num_units - 1, TILE):
        o_j = (i_start + o_tile)[None, :]
        m_j = m_g & (o_j + 1 < num_units)
        b_left = tl.load(p_rows + o_j, mask=m_j, other=float("-inf"))
        b_right = tl.load(p_rows + o_j + 1, mask=m_j, other=float("-inf"))
        b_max, b_sum = online_softmax(b_max, b_sum, (b_left + b_right) * 0.5)
    b_top, b_inverse = finish_softmax(b_max, b_sum)
    for i_start in range(0, num_blocks, TILE):
        o_n = i_start + o_tile
        b_best = tl.full([TILE], float("-inf"), tl.float32)
        o_u = o_n * W - 1
        m_u = (o_u >= 0) & (o_u < num_units)
        b_left = tl.load(p_rows + o_u[None, :], mask=m_g & m_u[None, :], other=float("-inf"))
        for i_w in tl.static_range(W + 1):
            m_left = m_u
            o_u += 1
            m_u = o_u < num_units
            b_right = tl.load(p_rows + o_u[None, :], mask=m_g & m_u[None, :], other=float("-inf"))
            b_weight = tl.exp((b_left + b_right) * 0.5 - b_top[:, None]) * b_inverse[:, None]
            b_window = tl.where(m_left & m_u, tl.sum(b_weight, axis=0), float("-inf"))
            if OVERLAP:  # the first and the last window have one sub-unit in the block, the others two
                b_inside = b_window if (i_w == 0 or i_w == W) else 2.0 * b_window
                b_both = tl.maximum(b_best, 0.0) + tl.maximum(b_inside, 0.0)
                b_best = tl.where(tl.maximum(b_best, b_inside) == float("-inf"), float("-inf"), b_both)
            else:
                b_best = tl.maximum(b_best, b_window)
            b_left = b_right
        tl.store(p_scores + o_n, b_best, mask=o_n < num_blocks)


# Grid (B * Hkv, splits): logits by all programs of a (row, head), then softmax and pooling by the last of them.
@triton.jit
def score_windows_kernel(
    q, summary, host_table, seq_lens, logits, arrivals, block_scores,
    softmax_scale, num_blocks, unit_tokens, Hkv,
    stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_lb, stride_lh, stride_bb, stride_bh,
    G: tl.constexpr, G_P: tl.constexpr, G_POOL: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, W: tl.constexpr,
    TILE: tl.constexpr, POOL_TILE: tl.constexpr, UPCAST_DOT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // Hkv).to(tl.int64)
    i_h = (tl.program_id(0) % Hkv).to(tl.int64)
    seq_len = tl.load(seq_lens + i_b)
    is_last = unit_logits(
        q, summary, host_table, host_table, seq_len, logits, arrivals, softmax_scale, num_blocks * W, num_blocks,
        unit_tokens, host_table, i_b, i_h, stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_lb,
        stride_lh, G, G_P, D, D_P, W, 1, TILE, UPCAST_DOT,
    )  # fmt: skip
    if is_last:
        num_units = tl.minimum(seq_len // unit_tokens, num_blocks * W)
        p_logits = logits + i_b * stride_lb + i_h * G * stride_lh
        p_scores = block_scores + i_b * stride_bb + i_h * stride_bh
        pool_windows(p_logits, p_scores, num_units, num_blocks, stride_lh, G, G_POOL, W, POOL_TILE, OVERLAP)


def score_windows(
    q: Tensor,
    summary: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    logits: Tensor,
    arrivals: Tensor,
    block_scores: Tensor,
    *,
    softmax_scale: float,
    block_size: int,
    pool: Literal["max", "overlap"] = "max",
) -> None:
    """Score blocks by the attention weights of the overlapping key windows that touch them.

    Arguments as in `csrc_free_kernels/reference/score_windows.py`; the last dim of every tensor is
    contiguous, `logits` is fp32 [B, Hq, N * W] scratch. One launch on the current stream, no wait.

    Raises:
        ValueError: a last dim is strided.
    """
    grid, sizes, strides = score_launch(q, summary, host_table, logits, block_scores)
    width = summary.shape[2]
    score_windows_kernel[grid](
        q, summary, host_table, seq_lens, logits, arrivals, block_scores,
        softmax_scale, block_scores.shape[2], block_size // width, block_scores.shape[1], *strides, **sizes,
        W=width, OVERLAP=pool == "overlap", num_warps=WARPS,
    )  # fmt: skip
