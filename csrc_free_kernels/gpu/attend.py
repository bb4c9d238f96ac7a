"""Partial attention of one decode step over selected KV blocks, read straight from the pool by slot."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.launch import launch_of, shared_bytes

NUM_WARPS = 4  # one row of 16-row MMA tiles: more warps would only split the keys of a tile further
TILE_BYTES = 16384  # of keys, and of values, worked on at once: 64 tokens at D = 128 in 16 bits
STAGES = 3  # a tile is computed while the next two load (64 KiB with the usual tiles)
ROOM_BYTES = 16384  # shared memory for q, p and reductions beside the tiles in flight

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cap_logits(x, soft_cap):
    # soft_cap * tanh(x / soft_cap). exp2 loses digits near 0, where an odd polynomial is exact to fp32.
    y = x / soft_cap
    s = y * y
    small = y * (1 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488))))
    e = tl.exp2(tl.abs(y) * -2 * LOG2E)
    large = (1 - e) / (1 + e)
    return soft_cap * tl.where(s < 0.04, small, tl.where(y < 0, -large, large))


# Attention of the G heads of one KV head over the present blocks among s = i_t, i_t + T, ...
# p_q [B, Hq, D]; p_k, p_v [L, C, D] with token stride D; p_ids, p_slots [S] of this (row, KV head);
# p_bias [L, C] or None.
# Returns out [BLOCK_G, BLOCK_D], normalised, and lse [BLOCK_G], natural log: 0 and -inf without keys.
@triton.jit
def attend_split(
    p_q, p_k, p_v, p_ids, p_slots, p_seq_lens, softmax_scale, soft_cap, window,
    p_bias, bias_scale, stride_bias, i_b, i_h,
    i_t, stride_qb, stride_qh, stride_k, stride_v,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    # loads that do not wait for each other first
    o_s = tl.arange(0, BLOCK_S) * T + i_t
    b_slots = tl.load(p_slots + o_s, mask=o_s < S, other=-1)
    b_ids = tl.load(p_ids + o_s, mask=o_s < S, other=0)
    seq_len = tl.load(p_seq_lens + i_b)
    b_q = load_q(p_q, i_b, i_h, stride_qb, stride_qh, G, D, BLOCK_G, BLOCK_D, UPCAST_DOT)
    b_word, b_rank = rank_present(b_ids, b_slots)
    return attend_ranks(
        b_q, p_k, p_v, b_word, b_rank, 0, tl.max(b_rank, 0), seq_len, softmax_scale, soft_cap, window,
        p_bias, bias_scale, stride_bias, stride_k, stride_v,
        D, C, BLOCK_G, BLOCK_D, BLOCK_C, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
    )  # fmt: skip


# Queries of one KV head's group, [BLOCK_G, BLOCK_D].
@triton.jit
def load_q(
    p_q, i_b, i_h, stride_qb, stride_qh,
    G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    p_row = p_q + i_b * stride_qb + (i_h * G + o_g[:, None]) * stride_qh + o_d[None, :]
    b_q = tl.load(p_row, mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST_DOT:
        b_q = b_q.to(tl.float32)
    return b_q


# Slot and id of each block in one word, and its rank, from 1, among those that have a slot (0: it has none).
@triton.jit
def rank_present(b_ids, b_slots):
    m_s = b_slots >= 0
    b_word = (b_slots.to(tl.int64) << 32) | b_ids.to(tl.int64)
    return b_word, tl.where(m_s, tl.cumsum(m_s.to(tl.int32), 0), 0)


# Attention over the `num_blocks` blocks that follow rank `first`. The loop picks them from registers: a load there
# would be pipelined too, and leave one buffer fewer for the blocks themselves.
@triton.jit
def attend_ranks(
    b_q, p_k, p_v, b_word, b_rank, first, num_blocks, seq_len, softmax_scale, soft_cap, window,
    p_bias, bias_scale, stride_bias, stride_k, stride_v,
    D: tl.constexpr, C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    o_c = tl.arange(0, BLOCK_C)
    m_d = o_d < D
    b_m = tl.full([BLOCK_G], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_G], tl.float32)
    b_o = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    PIECES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    for i in range(num_blocks * PIECES):
        word = tl.sum(tl.where(b_rank == first + i // PIECES + 1, b_word, 0), 0)
        slot = word >> 32
        o_token = i % PIECES * BLOCK_C + o_c
        pos = word.to(tl.int32) * C + o_token
        m_c = (o_token < C) & (pos < seq_len)
        if HAS_WINDOW:
            m_c = m_c & (pos > seq_len - 1 - window)
        o_kv = o_token[:, None] * D + o_d[None, :]
        m_kv = m_c[:, None] & m_d[None, :]
        b_k = tl.load(p_k + slot * stride_k + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(p_v + slot * stride_v + o_kv, mask=m_kv, other=0.0)
        if UPCAST_DOT:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        b_x = softmax_scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_G, BLOCK_C]
        if HAS_CAP:
            b_x = cap_logits(b_x, soft_cap)
        if HAS_BIAS:
            b_bias = tl.load(p_bias + slot * stride_bias + o_token, mask=m_c, other=0.0)
            b_x += bias_scale * b_bias.to(tl.float32)[None, :]
        b_x = tl.where(m_c[None, :], b_x * LOG2E, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_x, 1))
        b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_decay = tl.exp2(b_m - b_shift)
        b_p = tl.exp2(b_x - b_shift[:, None])
        b_l = b_l * b_decay + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision="ieee")
        b_m = b_max

    m_any = b_l != 0  # NaN among the keys counts, and must reach the result
    b_l = tl.where(m_any, b_l, 1.0)
    b_lse = tl.where(m_any, (b_m + tl.log2(b_l)) * LN2, float("-inf"))
    return b_o / b_l[:, None], b_lse


# Writes one part: p_out [Hq, D] and p_lse [Hq] of one row.
@triton.jit
def store_part(
    p_out, p_lse, b_o, b_lse, i_h, stride_oh, stride_lh,
    G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_h = i_h * G + o_g
    p_o = p_out + o_h[:, None] * stride_oh + o_d[None, :]
    tl.store(p_o, b_o, mask=(o_g < G)[:, None] & (o_d < D)[None, :])
    tl.store(p_lse + o_h * stride_lh, b_lse, mask=o_g < G)


# Grid (B * Hkv, T). p_ids, p_slots [B, Hkv, S]; p_out [T, B, Hq, D]; p_lse [T, B, Hq].
@triton.jit
def attend_kernel(
    p_q, p_k, p_v, p_ids, p_slots, p_seq_lens, p_out, p_lse,
    softmax_scale, soft_cap, window, p_bias, bias_scale, stride_bias,
    stride_qb, stride_qh, stride_k, stride_v, stride_ib, stride_ih, stride_sb, stride_sh,
    stride_ot, stride_ob, stride_oh, stride_lt, stride_lb, stride_lh,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    i_b = i_bh // H_KV
    i_h = i_bh % H_KV
    b_o, b_lse = attend_split(
        p_q, p_k, p_v, p_ids + i_b * stride_ib + i_h * stride_ih, p_slots + i_b * stride_sb + i_h * stride_sh,
        p_seq_lens, softmax_scale, soft_cap, window, p_bias, bias_scale, stride_bias, i_b, i_h, i_t,
        stride_qb, stride_qh, stride_k, stride_v,
        G, D, C, S, T, BLOCK_G, BLOCK_D, BLOCK_C, BLOCK_S, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
    )  # fmt: skip
    p_out += i_t.to(tl.int64) * stride_ot + i_b * stride_ob
    p_lse += i_t.to(tl.int64) * stride_lt + i_b * stride_lb
    store_part(p_out, p_lse, b_o, b_lse, i_h, stride_oh, stride_lh, G, D, BLOCK_G, BLOCK_D)


def attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_ids: Tensor,
    block_slots: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
    bias_pool: Tensor | None = None,
    bias_scale: float = 1.0,
) -> None:
    """Attend to the blocks of each (row, KV head) that have a slot, in T splits that merge later.

    Launched on the current stream; does not block. Dots run in the dtype of q with fp32 accumulation.

    Args:
        q: [B, Hq, D], last dim contiguous.
        k_pool: [L, C, D], token stride D. Slots that are not named may hold anything.
        v_pool: [L, C, D], token stride D.
        block_ids: int32 [B, Hkv, S], logical block ids, which fix the token positions.
        block_slots: int32 [B, Hkv, S], -1 = leave this entry out (costs no memory traffic).
        seq_lens: int32 [B], tokens; 0 = the row has no keys.
        out: fp32 [T, B, Hq, D]; split t takes the entries s with s % T == t. Every element is written.
        lse: fp32 [T, B, Hq], natural log; a split without keys gets out 0 and lse -inf.
        softmax_scale: factor on q.k.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap).
        window: None, or only the last `window` tokens count.
        bias_pool: [L, C] or None: a number per token; `bias_scale` times it is added to the (capped) logit.
        bias_scale: factor on the bias.
    """
    num_splits, batch, num_kv_heads = out.shape[0], q.shape[0], block_ids.shape[1]
    attend_kernel[(batch * num_kv_heads, num_splits)](
        q, k_pool, v_pool, block_ids, block_slots, seq_lens, out, lse,
        softmax_scale, 1.0 if soft_cap is None else soft_cap, 0 if window is None else window,
        bias_pool, bias_scale, 0 if bias_pool is None else bias_pool.stride(0),
        *q.stride()[:2], k_pool.stride(0), v_pool.stride(0), *block_ids.stride()[:2], *block_slots.stride()[:2],
        *out.stride()[:3], *lse.stride(),
        **attend_sizes(q, k_pool, block_ids, num_splits),
        HAS_CAP=soft_cap is not None, HAS_WINDOW=window is not None, HAS_BIAS=bias_pool is not None,
    )  # fmt: skip


def attend_sizes(q: Tensor, k_pool: Tensor, block_ids: Tensor, num_splits: int) -> dict[str, Any]:
    """Constexpr sizes and launch options of a kernel that attends in `num_splits` splits."""
    (rows, num_q_heads, dim), (_, heads, num_ids) = q.shape, block_ids.shape
    block_size, group = k_pool.shape[1], num_q_heads // heads
    block_d, itemsize = triton.next_power_of_2(dim), q.element_size()
    use = {"num_warps": NUM_WARPS, "num_stages": STAGES, "tokens": TILE_BYTES // (block_d * itemsize)}
    if itemsize > 2:  # without tensor cores the products take more registers: other choices spill
        use |= {"num_warps": 2 * NUM_WARPS, "num_stages": 2}
    use |= launch_of("attend", q.device, rows * heads, dim=block_d, block_size=block_size, itemsize=itemsize)
    block_c = max(16, min(block_size, use["tokens"]))
    fitting = 1 + (shared_bytes(q.device) - ROOM_BYTES) // (2 * block_c * block_d * itemsize)
    return {
        "H_KV": heads, "G": group, "D": dim, "C": block_size, "S": num_ids, "T": num_splits,
        "BLOCK_G": max(16, triton.next_power_of_2(group)), "BLOCK_D": block_d, "BLOCK_C": block_c,
        "BLOCK_S": triton.next_power_of_2(triton.cdiv(num_ids, num_splits)),
        "UPCAST_DOT": q.device.type == "cpu",
        "num_warps": use["num_warps"], "num_stages": max(2, min(use["num_stages"], fitting)),
    }  # fmt: skip
