"""Triton `score_mean`: raw logits of all summaries, then softmax and mean over the group, in one launch.

The programs of a (row, head) count themselves in; the last one sees everybody's logits and finishes the job. What
precedes the pooling is shared with `score_windows`.
"""

import triton
import triton.language as tl
from torch import Tensor

UNIT_TILE = 64  # summaries a program scores at once: 16 KiB of bf16 at D = 128
LOGITS_PROGRAMS = 512  # programs worth launching, about 4 an SM: small batches are split over the summaries
WARPS = 4
POOL_ELEMENTS = 2048  # logits that pooling holds at once: 16 a thread
LOWEST = tl.constexpr(-3.0e38)  # finite stand-in for -inf, so that differences are never NaN


# The block at a place among the candidates: those of the open groups, R blocks each, in order. R = 1: all blocks are.
@triton.jit
def block_at(p_groups, o_n, m_n, R: tl.constexpr):
    if R == 1:
        return o_n
    else:
        return tl.load(p_groups + o_n // R, mask=m_n, other=0) * R + o_n % R


# Raw logits of the finished sub-units of one (row, head), tiles dealt out to the splits.
# q [B, Hq, D], summary [P, Hkv, W, D], host_table [B, num_pages] -> logits fp32 [B, Hq, N * W]; of candidates only
# where p_groups [K] says so (R > 1, then W = 1), for which `seq_len` is the tokens in them; then p_ahead [num_pages] is
# what the caller reads next of the candidates.
# Returns whether this program is the last of its (row, head): it may then read what all of them wrote.
@triton.jit
def unit_logits(
    q, summary, host_table, p_groups, seq_len, logits, arrivals, softmax_scale, max_units, num_pages, unit_tokens,
    p_ahead, i_b, i_h, stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_lb, stride_lh,
    G: tl.constexpr, G_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    num_units = tl.minimum(seq_len // unit_tokens, max_units)
    o_g = tl.arange(0, G_P)
    o_d = tl.arange(0, D_P)
    m_g = o_g < G
    m_d = o_d < D
    p_q = q + i_b * stride_qb + (i_h * G + o_g)[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_g[:, None] & m_d[None, :], other=0.0)
    if UPCAST_DOT:
        b_q = b_q.to(tl.float32)
    for i_start in range(tl.program_id(1) * TILE, max_units, tl.num_programs(1) * TILE):
        o_u = i_start + tl.arange(0, TILE)
        m_u = o_u < num_units
        # as far as the tables go, so that these loads need not wait for the length; what is listed past it is not used
        m_page = o_u < max_units
        b_block = block_at(p_groups, o_u // W, m_page, R)
        if R > 1:
            m_page = m_page & (b_block >= 0) & (b_block < num_pages)
            # no value is waited for: it is then in the L2 cache
            tl.load(p_ahead + b_block, mask=m_page, other=0, volatile=True)
        b_page = tl.load(host_table + i_b * stride_tb + b_block, mask=m_page, other=0)
        b_page = tl.maximum(b_page, 0).to(tl.int64)
        p_k = summary + b_page * stride_sp + i_h * stride_sh + (o_u % W) * stride_sw
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_u[:, None] & m_d[None, :], other=0.0)
        if UPCAST_DOT:
            b_k = b_k.to(tl.float32)
        b_logits = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * softmax_scale
        p_logits = logits + i_b * stride_lb + (i_h * G + o_g)[:, None] * stride_lh + o_u[None, :]
        tl.store(p_logits, b_logits, mask=m_g[:, None] & m_u[None, :])
    return arrive(arrivals + tl.program_id(0))


# Counts the programs of a (row, head) in; true for the last of them, which may then read what all wrote.
@triton.jit
def arrive(p_arrivals):
    tl.debug_barrier()  # every thread's results are written before the one atomic that releases them
    is_last = tl.num_programs(1) == 1
    if not is_last:
        is_last = tl.atomic_add(p_arrivals, 1, sem="acq_rel") == tl.num_programs(1) - 1
        if is_last:
            tl.store(p_arrivals, 0)
    return is_last


# Folds a tile of logits [G_P, TILE] into the running maximum and sum of exponentials, lane by lane.
@triton.jit
def online_softmax(b_max, b_sum, b_x):
    b_new = tl.maximum(b_max, b_x)
    return b_new, b_sum * tl.exp(b_max - b_new) + tl.exp(b_x - b_new)


# Joins the lanes: maximum [G_P] and inverse sum [G_P] of each query head; 0 for a head without logits.
@triton.jit
def finish_softmax(b_max, b_sum):
    b_top = tl.max(b_max, axis=1)
    b_total = tl.sum(b_sum * tl.exp(b_max - b_top[:, None]), axis=1)
    return b_top, tl.where(b_total > 0, 1.0 / tl.where(b_total > 0, b_total, 1.0), 0.0)


# As pool_mean, where one tile holds all blocks; also returns the scores [TILE].
@triton.jit
def pool_mean_at_once(
    p_logits, p_scores, num_closed, num_blocks, stride_lh,
    G: tl.constexpr, G_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    o_g = tl.arange(0, G_P)
    o_n = tl.arange(0, TILE)
    m_n = o_n < num_closed
    p_rows = p_logits + o_g[:, None] * stride_lh + o_n[None, :]
    b_x = tl.load(p_rows, mask=(o_g < G)[:, None] & m_n[None, :], other=float("-inf"))
    b_weight = tl.exp(b_x - tl.maximum(tl.max(b_x, axis=1), LOWEST)[:, None])
    b_total = tl.sum(b_weight, axis=1)
    b_weight = b_weight / tl.where(b_total > 0, b_total, 1.0)[:, None]
    b_score = tl.where(m_n, tl.sum(b_weight, axis=0) / G, float("-inf"))
    tl.store(p_scores + o_n, b_score, mask=o_n < num_blocks)
    return b_score


# Softmax of the logits of one (row, head) over the closed blocks, averaged over the group.
# logits fp32 [B, Hq, N] -> block_scores fp32 [B, Hkv, N].
@triton.jit
def pool_mean(
    p_logits, p_scores, num_closed, num_blocks, stride_lh,
    G: tl.constexpr, G_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    o_g = tl.arange(0, G_P)
    o_tile = tl.arange(0, TILE)
    m_g = (o_g < G)[:, None]
    p_rows = p_logits + o_g[:, None] * stride_lh
    b_max = tl.full([G_P, TILE], LOWEST, tl.float32)
    b_sum = tl.zeros([G_P, TILE], tl.float32)
    for i_start in range(0, num_closed, TILE):
        o_n = (i_start + o_tile)[None, :]
        b_x = tl.load(p_rows + o_n, mask=m_g & (o_n < num_closed), other=float("-inf"))
        b_max, b_sum = online_softmax(b_max, b_sum, b_x)
    b_top, b_inverse = finish_softmax(b_max, b_sum)
    for i_start in range(0, num_blocks, TILE):
        o_n = i_start + o_tile
        m_n = o_n < num_closed
        b_x = tl.load(p_rows + o_n[None, :], mask=m_g & m_n[None, :], other=float("-inf"))
        b_weight = tl.exp(b_x - b_top[:, None]) * b_inverse[:, None]
        b_score = tl.where(m_n, tl.sum(b_weight, axis=0) / G, float("-inf"))
        tl.store(p_scores + o_n, b_score, mask=o_n < num_blocks)


# Grid (B * Hkv, splits): logits by all programs of a (row, head), then softmax and pooling by the last of them.
@triton.jit
def score_mean_kernel(
    q, summary, host_table, seq_lens, logits, arrivals, block_scores,
    softmax_scale, num_blocks, block_size, Hkv,
    stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_lb, stride_lh, stride_bb, stride_bh,
    G: tl.constexpr, G_P: tl.constexpr, G_POOL: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    TILE: tl.constexpr, POOL_TILE: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // Hkv).to(tl.int64)
    i_h = (tl.program_id(0) % Hkv).to(tl.int64)
    seq_len = tl.load(seq_lens + i_b)
    is_last = unit_logits(
        q, summary, host_table, host_table, seq_len, logits, arrivals, softmax_scale, num_blocks, num_blocks,
        block_size, host_table, i_b, i_h, stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_lb,
        stride_lh, G, G_P, D, D_P, 1, 1, TILE, UPCAST_DOT,
    )  # fmt: skip
    if is_last:
        num_closed = tl.minimum(seq_len // block_size, num_blocks)
        p_logits = logits + i_b * stride_lb + i_h * G * stride_lh
        p_scores = block_scores + i_b * stride_bb + i_h * stride_bh
        pool_mean(p_logits, p_scores, num_closed, num_blocks, stride_lh, G, G_POOL, POOL_TILE)


def score_mean(
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
) -> None:
    """Score every closed block by the softmax of its mean key, averaged over the query heads of the group.

    Arguments as in `csrc_free_kernels/reference/score_mean.py`; the last dim of every tensor is contiguous,
    `logits` is fp32 [B, Hq, N] scratch. One launch on the current stream, no wait.

    Raises:
        ValueError: a last dim is strided, or `summary` does not hold one vector a block.
    """
    if summary.shape[2] != 1:
        raise ValueError(f"score_mean takes one mean a block, not {summary.shape[2]}")
    grid, sizes, strides = score_launch(q, summary, host_table, logits, block_scores)
    score_mean_kernel[grid](
        q, summary, host_table, seq_lens, logits, arrivals, block_scores,
        softmax_scale, block_scores.shape[2], block_size, block_scores.shape[1], *strides, **sizes,
        num_warps=WARPS,
    )  # fmt: skip


def score_launch(
    q: Tensor, summary: Tensor, host_table: Tensor, logits: Tensor, block_scores: Tensor
) -> tuple[tuple[int, int], dict[str, int], tuple[int, ...]]:
    """Return grid, constexpr sizes and strides of a launch that scores sub-unit means.

    Raises:
        ValueError: a last dim is strided.
    """
    for t in (q, summary, host_table, logits, block_scores):
        if t.stride(-1) != 1:
            raise ValueError(f"the last dim must be contiguous; strides are {t.stride()}")
    num_rows, num_kv_heads, num_blocks = block_scores.shape
    head_dim, programs = summary.shape[3], num_rows * num_kv_heads
    group = q.shape[1] // num_kv_heads
    splits = min(
        triton.cdiv(num_blocks * summary.shape[2], UNIT_TILE), triton.cdiv(LOGITS_PROGRAMS, programs)
    )
    pooled = triton.next_power_of_2(group)
    sizes = {
        "G": group,
        "G_P": max(16, pooled),
        "G_POOL": pooled,
        "D": head_dim,
        "D_P": triton.next_power_of_2(head_dim),
        "TILE": UNIT_TILE,
        "POOL_TILE": min(max(64, POOL_ELEMENTS // pooled), triton.next_power_of_2(num_blocks)),
        "UPCAST_DOT": not q.is_cuda,
    }
    strides = (*q.stride()[:2], *summary.stride()[:3], host_table.stride(0))
    return (programs, splits), sizes, (*strides, *logits.stride()[:2], *block_scores.stride()[:2])
