"""Merging partial attention results by log-sum-exp."""

import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 1  # a program reads a few KiB: more warps only add a cross-warp reduction
BLOCK_T = 8  # parts read at once


# Merges the parts of one query head, BLOCK_T at a time with a running maximum. p_parts [T, D] and p_lse_parts
# [T] with their strides; p_sink, p_out [D] and p_lse are that head's own.
@triton.jit
def merge_head(
    p_parts, p_lse_parts, p_sink, p_out, p_lse, num_parts, stride_pt, stride_lt,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, HAS_SINK: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    m = float("-inf")
    total = 0.0
    b_o = tl.zeros([BLOCK_D], tl.float32)
    for i_t in range(0, num_parts, BLOCK_T):
        o_t = (i_t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = o_t < num_parts
        b_x = tl.load(p_lse_parts + o_t * stride_lt, mask=m_t, other=float("-inf"))
        p_tile = p_parts + o_t[:, None] * stride_pt + o_d[None, :]
        # empty parts hold anything: they are read, as a load that waits for lse would cost more, and dropped
        b_part = tl.load(p_tile, mask=m_t[:, None] & (o_d[None, :] < D), other=0.0)
        b_part = tl.where((b_x != float("-inf"))[:, None], b_part, 0.0)  # NaN is no empty part
        m_new = tl.maximum(m, tl.max(b_x, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_w = tl.exp(b_x - shift)
        decay = tl.exp(m - shift)
        total = total * decay + tl.sum(b_w, 0)
        b_o = b_o * decay + tl.sum(b_w[:, None] * b_part, 0)
        m = m_new

    if HAS_LSE:
        safe = tl.where(total != 0, total, 1.0)
        tl.store(p_lse, tl.where(total != 0, m + tl.log(safe), float("-inf")))
    if HAS_SINK:
        sink = tl.load(p_sink).to(tl.float32)
        m_new = tl.maximum(m, sink)
        decay = tl.exp(m - m_new)
        total = total * decay + tl.exp(sink - m_new)
        b_o = b_o * decay
    b_o = b_o / tl.where(total != 0, total, 1.0)
    tl.store(p_out + o_d, b_o.to(p_out.dtype.element_ty), mask=o_d < D)


# Grid (B * Hq,), one query head a program.
# p_parts [T, B, Hq, D]; p_lse_parts [T, B, Hq]; p_sinks [Hq]; p_out [B, Hq, D]; p_lse [B, Hq].
@triton.jit
def merge_kernel(
    p_parts, p_lse_parts, p_sinks, p_out, p_lse, num_parts,
    stride_pt, stride_pb, stride_ph, stride_lt, stride_lb, stride_lh,
    stride_ob, stride_oh, stride_sb, stride_sh,
    H_Q: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // H_Q
    i_h = i_bh % H_Q
    if HAS_SINK:
        p_sinks += i_h
    if HAS_LSE:
        p_lse += i_b * stride_sb + i_h * stride_sh
    merge_head(
        p_parts + i_b * stride_pb + i_h * stride_ph, p_lse_parts + i_b * stride_lb + i_h * stride_lh, p_sinks,
        p_out + i_b * stride_ob + i_h * stride_oh, p_lse, num_parts, stride_pt, stride_lt,
        D, BLOCK_T, BLOCK_D, HAS_SINK, HAS_LSE,
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
