"""What the token just appended says of the blocks behind it, by its bias."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.reference.rank_bias import Pooling, check_pooling

TILE = 32  # parts whose place among all parts of a block is counted at once


# The element of p_parts [W] that (W - 1) // 2 others come before; ties count by place.
@triton.jit
def lower_median(p_parts, W: tl.constexpr, TILE: tl.constexpr):
    o_all = tl.arange(0, W)
    b_all = tl.load(p_parts + o_all)
    median = 0.0
    for first in range(0, W, TILE):
        o_part = first + tl.arange(0, TILE)
        b_part = tl.load(p_parts + o_part)
        m_less = (b_all[None, :] < b_part[:, None]) | (
            (b_all[None, :] == b_part[:, None]) & (o_all[None, :] < o_part[:, None])
        )
        b_place = tl.sum(m_less.to(tl.int32), 1)
        median += tl.sum(tl.where(b_place == (W - 1) // 2, b_part, 0.0), 0)
    return median


# Grid (B * HKV,): one (row, head). W parts of SIZE tokens; shapes as in the contract.
@triton.jit
def rank_bias_kernel(
    seq_lens, host_table, slot_of, bias_pool, unit_bias, heat,
    stride_tb, stride_sb, stride_sh, stride_pool, stride_up, stride_uh, stride_hb, stride_hh,
    HKV: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    POOLING: tl.constexpr,
):  # fmt: skip
    i_b, i_h = (tl.program_id(0) // HKV).to(tl.int64), (tl.program_id(0) % HKV).to(tl.int64)
    seq_len = tl.load(seq_lens + i_b)
    if seq_len > 0:
        block, offset = (seq_len - 1) // C, (seq_len - 1) % C
        p_table, p_units = host_table + i_b * stride_tb, unit_bias + i_h * stride_uh
        page = tl.load(p_table + block).to(tl.int64)
        slot = tl.load(slot_of + i_b * stride_sb + i_h * stride_sh + block).to(tl.int64)
        part = offset // SIZE
        o_token = part * SIZE + tl.arange(0, SIZE)
        m_token = (o_token <= offset) & (slot >= 0)
        b_token = tl.load(bias_pool + slot * stride_pool + o_token, mask=m_token, other=0.0)
        mean = tl.sum(b_token.to(tl.float32), 0) / SIZE
        is_complete = ((offset + 1) % SIZE == 0) & (slot >= 0)
        tl.store(p_units + page * stride_up + part, mean, mask=is_complete)
        if block > 0:
            if POOLING == "median":
                page = tl.load(p_table + block - 1).to(tl.int64)
                rank = lower_median(p_units + page * stride_up, W, TILE)
            else:
                # window i is the parts i and i + 1 of the row; the new part comes from a register
                o_left = (block - 1) * W - 1 + tl.arange(0, 2 * W)
                o_right = o_left + 1
                m_window = (o_left >= 0) & (o_left < block * W) & (o_right < seq_len // SIZE)
                b_page = tl.load(p_table + o_left // W, mask=m_window, other=0).to(tl.int64)
                b_left = tl.load(p_units + b_page * stride_up + o_left % W, mask=m_window, other=0.0)
                m_old = m_window & (o_right != block * W + part)
                b_page = tl.load(p_table + o_right // W, mask=m_old, other=0).to(tl.int64)
                b_right = tl.load(p_units + b_page * stride_up + o_right % W, mask=m_old, other=0.0)
                b_right = tl.where(m_old, b_right, mean)
                rank = tl.max(tl.where(m_window, (b_left + b_right) / 2, float("-inf")), 0)
            tl.store(heat + i_b * stride_hb + i_h * stride_hh + block - 1, rank)


def rank_bias(
    seq_lens: Tensor,
    host_table: Tensor,
    slot_of: Tensor,
    bias_pool: Tensor,
    unit_bias: Tensor,
    heat: Tensor,
    *,
    block_size: int,
    pooling: Pooling,
) -> None:
    """Note the mean bias of the part that the new token completes, and rank the block ahead of the tail by its parts.

    Arguments and errors as in `csrc_free_kernels/reference/rank_bias.py`; the last dim of every tensor is contiguous,
    block size and W are powers of two. Launched on the current stream; does not block.
    """
    check_pooling(pooling)
    rows, heads, _ = slot_of.shape
    width = unit_bias.shape[2]
    rank_bias_kernel[(rows * heads,)](
        seq_lens, host_table, slot_of, bias_pool, unit_bias, heat,
        host_table.stride(0), *slot_of.stride()[:2], bias_pool.stride(0), *unit_bias.stride()[:2], *heat.stride()[:2],
        HKV=heads, C=block_size, W=width, SIZE=block_size // width, TILE=min(TILE, width), POOLING=pooling,
        num_warps=1 if pooling == "windows" else 4,
    )  # fmt: skip
