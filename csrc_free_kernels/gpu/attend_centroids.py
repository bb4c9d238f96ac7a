"""Triton `attend_centroids`: estimated attention over the closed blocks that a step did not select."""

import math

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.attend import LN2, LOG2E, cap_logits, store_part

TILE_BYTES = 8192  # of mean keys, and of mean values, worked on at once: 32 at D = 128 in 16 bits
TILE_IDS = 32  # selected ids compared with a tile at a time
NUM_WARPS = 4  # twice as many for fp32, whose products take no matrix instructions but registers


# Whether each block of o_n is among p_selected [S]; compared in tiles, as registers cannot hold all pairs.
@triton.jit
def is_selected(p_selected, o_n, S: tl.constexpr, IDS: tl.constexpr):
    b_found = tl.zeros_like(o_n)
    for i_start in range(0, S, IDS):
        o_s = i_start + tl.arange(0, IDS)
        b_ids = tl.load(p_selected + o_s, mask=o_s < S, other=-1)
        b_found += tl.sum((o_n[:, None] == b_ids[None, :]).to(tl.int32), 1)
    return b_found > 0


# Grid (B * Hkv, T); a program estimates the blocks n % T == t of one (row, KV head).
@triton.jit
def attend_centroids_kernel(
    p_q, p_mean_k, p_mean_v, p_table, p_seq_lens, p_selected, p_out, p_lse,
    softmax_scale, soft_cap, log_count, num_blocks, block_size,
    stride_qb, stride_qh, stride_kp, stride_kh, stride_kw, stride_vp, stride_vh, stride_vw, stride_tb,
    stride_sb, stride_sh, stride_ot, stride_ob, stride_oh, stride_lt, stride_lb, stride_lh,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr, IDS: tl.constexpr,
    HAS_CAP: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // H_KV).to(tl.int64)
    i_h = (tl.program_id(0) % H_KV).to(tl.int64)
    i_t = tl.program_id(1)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    num_closed = tl.minimum(tl.load(p_seq_lens + i_b) // block_size, num_blocks)
    p_row = p_q + i_b * stride_qb + (i_h * G + o_g[:, None]) * stride_qh + o_d[None, :]
    b_q = tl.load(p_row, mask=(o_g < G)[:, None] & m_d[None, :], other=0.0)
    if UPCAST_DOT:
        b_q = b_q.to(tl.float32)
    p_selected += i_b * stride_sb + i_h * stride_sh

    b_m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_G], tl.float32)
    b_o = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    num_own = (num_closed - i_t + T - 1) // T
    for i_start in range(0, num_own * W, BLOCK_U):
        o_u = i_start + tl.arange(0, BLOCK_U)
        o_n = o_u // W * T + i_t
        m_u = (o_n < num_closed) & (is_selected(p_selected, o_n, S, IDS) == 0)
        b_page = tl.load(p_table + i_b * stride_tb + o_n, mask=m_u, other=0).to(tl.int64)
        m_kv = m_u[:, None] & m_d[None, :]
        o_k = b_page * stride_kp + i_h * stride_kh + o_u % W * stride_kw
        o_v = b_page * stride_vp + i_h * stride_vh + o_u % W * stride_vw
        b_k = tl.load(p_mean_k + o_k[:, None] + o_d[None, :], mask=m_kv, other=0.0)
        b_v = tl.load(p_mean_v + o_v[:, None] + o_d[None, :], mask=m_kv, other=0.0)
        if UPCAST_DOT:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        b_x = softmax_scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_G, BLOCK_U]
        if HAS_CAP:
            b_x = cap_logits(b_x, soft_cap)
        b_x = tl.where(m_u[None, :], (b_x + log_count) * LOG2E, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_x, 1))
        b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_decay = tl.exp2(b_m - b_shift)
        b_p = tl.exp2(b_x - b_shift[:, None])
        b_l = b_l * b_decay + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision="ieee")
        b_m = b_max

    m_any = b_l != 0  # NaN counts, and must reach the result
    b_l = tl.where(m_any, b_l, 1.0)
    b_lse = tl.where(m_any, (b_m + tl.log2(b_l)) * LN2, float("-inf"))
    p_out += i_t.to(tl.int64) * stride_ot + i_b * stride_ob
    p_lse += i_t.to(tl.int64) * stride_lt + i_b * stride_lb
    store_part(p_out, p_lse, b_o / b_l[:, None], b_lse, i_h, stride_oh, stride_lh, G, D, BLOCK_G, BLOCK_D)


def attend_centroids(
    q: Tensor,
    mean_k: Tensor,
    mean_v: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    selected_blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    block_size: int,
) -> None:
    """Attend to the closed blocks that are not selected, each sub-unit as if all its tokens were their mean.

    Arguments as in `csrc_free_kernels/reference/attend_centroids.py`; the last dim of every tensor is contiguous,
    the means have the dtype of q. One launch on the current stream, no wait.
    """
    assert q.stride(2) == mean_k.stride(3) == mean_v.stride(3) == host_table.stride(1) == 1
    assert selected_blocks.stride(2) == out.stride(3) == 1
    (num_splits, batch, num_q_heads, dim), (_, heads, units, _) = out.shape, mean_k.shape
    group, block_d = num_q_heads // heads, triton.next_power_of_2(dim)
    attend_centroids_kernel[(batch * heads, num_splits)](
        q, mean_k, mean_v, host_table, seq_lens, selected_blocks, out, lse,
        softmax_scale, 1.0 if soft_cap is None else soft_cap, math.log(block_size // units),
        host_table.shape[1], block_size,
        *q.stride()[:2], *mean_k.stride()[:3], *mean_v.stride()[:3], host_table.stride(0),
        *selected_blocks.stride()[:2], *out.stride()[:3], *lse.stride(),
        H_KV=heads, G=group, D=dim, W=units, S=selected_blocks.shape[2], T=num_splits,
        BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_D=block_d,
        BLOCK_U=max(16, TILE_BYTES // (block_d * q.element_size())), IDS=TILE_IDS,
        HAS_CAP=soft_cap is not None, UPCAST_DOT=q.device.type == "cpu",
        num_warps=NUM_WARPS * (2 if q.element_size() == 4 else 1), num_stages=2,
    )  # fmt: skip
