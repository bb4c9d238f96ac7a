"""Merging partial attention results by log-sum-exp."""

import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 1  # a program reads a few KiB: more warps only add a cross-warp reduction
BLOCK_T = 8  # parts read at once


# Merges the parts of the heads first .. last - 1 (at most HEADS) of one row, BLOCK_T at a time with a running
# maximum. p_parts [T, Hq, D], p_lse_parts [T, Hq], p_out [Hq, D] and p_lse [Hq] (or None) of the row; p_sinks [Hq].
@triton.jit
def merge_heads(
    p_parts, p_lse_parts, p_sinks, p_out, p_lse, first, last, num_parts,
    stride_pt, stride_ph, stride_lt, stride_lh, stride_oh, stride_eh,
    D: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    o_h = first + tl.arange(0, HEADS)
    m_h = o_h < last
    b_m = tl.full([HEADS], float("-inf"), tl.float32)
    b_total = tl.zeros([HEADS], tl.float32)
    b_o = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for i_t in range(0, num_parts, BLOCK_T):
        o_t = (i_t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = (o_t < num_parts)[:, None] & m_h[None, :]
        p_x = p_lse_parts + o_t[:, None] * stride_lt + o_h[None, :] * stride_lh
        b_x = tl.load(p_x, mask=m_t, other=float("-inf"))
        p_tile = (
            p_parts + o_t[:, None, None] * stride_pt + o_h[None, :, None] * stride_ph + o_d[None, None, :]
        )
        # empty parts hold anything: they are read, as a load that waits for lse would cost more, and dropped
        b_part = tl.load(p_tile, mask=m_t[:, :, None] & (o_d < D)[None, None, :], other=0.0)
        b_part = tl.where((b_x != float("-inf"))[:, :, None], b_part, 0.0)  # NaN is no empty part
        b_new = tl.maximum(b_m, tl.max(b_x, 0))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_w = tl.exp(b_x - b_shift[None, :])
        b_decay = tl.exp(b_m - b_shift)
        b_total = b_total * b_decay + tl.sum(b_w, 0)
        b_o = b_o * b_decay[:, None] + tl.sum(b_w[:, :, None] * b_part, 0)
        b_m = b_new

    m_any = b_total != 0
    if HAS_LSE:
        b_lse = tl.where(m_any, b_m + tl.log(tl.where(m_any, b_total, 1.0)), float("-inf"))
        tl.store(p_lse + o_h * stride_eh, b_lse, mask=m_h)
    if HAS_SINK:
        b_sink = tl.load(p_sinks + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_new = tl.maximum(b_m, b_sink)
        b_decay = tl.exp(b_m - b_new)
        b_total = b_total * b_decay + tl.exp(b_sink - b_new)
        b_o = b_o * b_decay[:, None]
    b_o = b_o / tl.where(b_total != 0, b_total, 1.0)[:, None]
    p_o = p_out + o_h[:, None] * stride_oh + o_d[None, :]
    tl.store(p_o, b_o.to(p_out.dtype.element_ty), mask=m_h[:, None] & (o_d < D)[None, :])


# Grid (B * Hq,), one query head a program.
# p_parts [T, B, Hq, D]; p_lse_parts [T, B, Hq]; p_sinks [Hq]; p_out [B, Hq, D]; p_lse [B, Hq].
@triton.jit
def merge_kernel(
    p_parts, p_lse_parts, p_sinks, p_out, p_lse, num_parts,
    stride_pt, stride_pb, stride_ph, stride_lt, stride_lb, stride_lh,
    stride_ob, stride_oh, stride_eb, stride_eh,
    H_Q: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // H_Q
    i_h = i_bh % H_Q
    if HAS_LSE:
        p_lse += i_b * stride_eb
    merge_heads(
        p_parts + i_b * stride_pb, p_lse_parts + i_b * stride_lb, p_sinks, p_out + i_b * stride_ob, p_lse,
        i_h, i_h + 1, num_parts, stride_pt, stride_ph, stride_lt, stride_lh, stride_oh, stride_eh,
        D, 1, BLOCK_T, BLOCK_D, HAS_SINK, HAS_LSE,
    )  # fmt: skip


def merge(
    out_parts: Tensor, lse_parts: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor | None
) -> None:
    """Combine partial attentions over disjoint sets of keys into the attention over their union.

    Launched on the current stream; does not block. Every element of `out` and `lse` is written.

    Args:
        out_parts: fp32 [T, B, Hq, D], last dim contiguous, each part normalised over its own keys.
        lse_parts: fp32 [T, B, Hq], natural log; -inf marks a part without keys, whose out is not read.
        sinks: [Hq] contiguous, any float dtype, or None: an extra logit a head, without a value.
        out: [B, Hq, D] in the model's dtype, last dim contiguous; 0 where there are no keys.
        lse: fp32 [B, Hq] or None to skip; of the keys alone, without the sink; -inf where there are none.
    """
    num_parts, batch, num_q_heads, head_dim = out_parts.shape
    merge_kernel[(batch * num_q_heads,)](
        out_parts, lse_parts, sinks, out, lse, num_parts,
        *out_parts.stride()[:3], *lse_parts.stride(), out.stride(0), out.stride(1),
        0 if lse is None else lse.stride(0), 0 if lse is None else lse.stride(1),
        H_Q=num_q_heads, D=head_dim, BLOCK_T=BLOCK_T, BLOCK_D=triton.next_power_of_2(head_dim),
        HAS_SINK=sinks is not None, HAS_LSE=lse is not None,
        num_warps=NUM_WARPS,
    )  # fmt: skip
