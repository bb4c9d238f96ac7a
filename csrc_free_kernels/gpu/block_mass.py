"""Triton `block_mass`: how the weights of a step's attention are spread over the blocks it attended to."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.attend import LOG2E, cap_logits
from csrc_free_kernels.launch import attend_splits

TILE_BYTES = 16384  # of keys worked on at once
NUM_WARPS = 4


# Grid (B * Hkv, T); a program weighs the blocks s % T == i_t of one (row, KV head), one after the other.
@triton.jit
def block_mass_kernel(
    p_q, p_k, p_ids, p_slots, p_seq_lens, p_lse, p_mass, softmax_scale, soft_cap,
    stride_qb, stride_qh, stride_k, stride_ib, stride_ih, stride_sb, stride_sh, stride_lb, stride_lh,
    stride_mb, stride_mh,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_CAP: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_b = (tl.program_id(0) // H_KV).to(tl.int64)
    i_h = (tl.program_id(0) % H_KV).to(tl.int64)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_c = tl.arange(0, BLOCK_C)
    m_g = o_g < G
    m_d = o_d < D
    seq_len = tl.load(p_seq_lens + i_b)
    p_row = p_q + i_b * stride_qb + (i_h * G + o_g[:, None]) * stride_qh + o_d[None, :]
    b_q = tl.load(p_row, mask=m_g[:, None] & m_d[None, :], other=0.0)
    if UPCAST_DOT:
        b_q = b_q.to(tl.float32)
    b_lse = tl.load(p_lse + i_b * stride_lb + (i_h * G + o_g) * stride_lh, mask=m_g, other=0.0)
    for i_s in range(tl.program_id(1), S, tl.num_programs(1)):
        slot = tl.load(p_slots + i_b * stride_sb + i_h * stride_sh + i_s).to(tl.int64)
        block = tl.load(p_ids + i_b * stride_ib + i_h * stride_ih + i_s)
        b_sum = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
        for i_c in range(0, C, BLOCK_C):
            o_token = i_c + o_c
            m_c = (o_token < C) & (block * C + o_token < seq_len) & (slot >= 0)
            p_key = p_k + slot * stride_k + o_token[:, None] * D + o_d[None, :]
            b_k = tl.load(p_key, mask=m_c[:, None] & m_d[None, :], other=0.0)
            if UPCAST_DOT:
                b_k = b_k.to(tl.float32)
            b_x = softmax_scale * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_G, BLOCK_C]
            if HAS_CAP:
                b_x = cap_logits(b_x, soft_cap)
            b_x = tl.where(m_g[:, None] & m_c[None, :], (b_x - b_lse[:, None]) * LOG2E, float("-inf"))
            b_sum += tl.exp2(b_x)
        total = tl.sum(tl.sum(b_sum, 1), 0) / G
        tl.store(p_mass + i_b * stride_mb + i_h * stride_mh + i_s, total)


def block_mass(
    q: Tensor,
    k_pool: Tensor,
    block_ids: Tensor,
    block_slots: Tensor,
    seq_lens: Tensor,
    lse: Tensor,
    mass: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
) -> None:
    """Sum the attention weights of every block that has a slot, averaged over the group's query heads.

    Arguments as in `csrc_free_kernels/reference/block_mass.py`; the last dim of every tensor is contiguous, tokens of
    `k_pool` have stride D. Reads every key once more. One launch on the current stream, no wait.
    """
    (rows, num_q_heads, dim), (_, heads, num_ids) = q.shape, block_ids.shape
    group, block_d, size = num_q_heads // heads, triton.next_power_of_2(dim), k_pool.shape[1]
    splits = attend_splits(rows * heads, num_ids, q.device)
    block_mass_kernel[(rows * heads, splits)](
        q, k_pool, block_ids, block_slots, seq_lens, lse, mass,
        softmax_scale, 1.0 if soft_cap is None else soft_cap,
        *q.stride()[:2], k_pool.stride(0), *block_ids.stride()[:2], *block_slots.stride()[:2], *lse.stride(),
        *mass.stride()[:2],
        H_KV=heads, G=group, D=dim, C=size, S=num_ids, BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=block_d, BLOCK_C=max(16, min(size, TILE_BYTES // (block_d * q.element_size()))),
        HAS_CAP=soft_cap is not None, UPCAST_DOT=q.device.type == "cpu", num_warps=NUM_WARPS, num_stages=2,
    )  # fmt: skip
