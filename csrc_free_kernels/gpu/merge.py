"""Merging partial attention results by log-sum-exp."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.reference.merge import blocks_per_part

NUM_WARPS = 1  # a program reads a few KiB: more warps only add a cross-warp reduction
BLOCK_T = 8  # parts read at once: the few that there mostly are


# Grid (B * Hq,), one query head a program, its parts BLOCK_T at a time with a running maximum.
# p_parts [T, B, Hq, D]; p_lse_parts [T, B, Hq]; p_late [B, Hkv, S]; p_sinks [Hq]; p_out [B, Hq, D]; p_lse [B, Hq].
@triton.jit
def merge_kernel(
    p_parts, p_lse_parts, p_late, p_sinks, p_out, p_lse, num_parts,
    stride_pt, stride_pb, stride_ph, stride_lt, stride_lb, stride_lh,
    stride_ob, stride_oh, stride_eb, stride_eh, stride_nb, stride_nh,
    H_Q: tl.constexpr, G: tl.constexpr, S: tl.constexpr, S_P: tl.constexpr, PER_PART: tl.constexpr,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_LSE: tl.constexpr, HAS_LATE: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H_Q, i_bh % H_Q
    o_d = tl.arange(0, BLOCK_D)
    if HAS_LATE:
        o_s = tl.arange(0, S_P)
        b_late = tl.load(p_late + i_b * stride_nb + (i_h // G) * stride_nh + o_s, mask=o_s < S, other=-1)
        num_parts += (tl.sum((b_late >= 0).to(tl.int32), 0) + PER_PART - 1) // PER_PART
    b_m = tl.full((), float("-inf"), tl.float32)
    b_total = tl.full((), 0.0, tl.float32)
    b_o = tl.zeros([BLOCK_D], tl.float32)
    for i_t in range(0, num_parts, BLOCK_T):
        o_t = (i_t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = o_t < num_parts
        p_x = p_lse_parts + o_t * stride_lt + i_b * stride_lb + i_h * stride_lh
        b_x = tl.load(p_x, mask=m_t, other=float("-inf"))
        p_tile = p_parts + o_t[:, None] * stride_pt + i_b * stride_pb + i_h * stride_ph + o_d[None, :]
        # empty parts hold anything: they are read, as a load that waits for lse would cost more, and dropped
        b_part = tl.load(p_tile, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
        b_part = tl.where((b_x != float("-inf"))[:, None], b_part, 0.0)  # NaN is no empty part
        b_new = tl.maximum(b_m, tl.max(b_x, 0))
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_w = tl.exp(b_x - b_shift)
        b_decay = tl.exp(b_m - b_shift)
        b_total = b_total * b_decay + tl.sum(b_w, 0)
        b_o = b_o * b_decay + tl.sum(b_w[:, None] * b_part, 0)
        b_m = b_new

    m_any = b_total != 0
    if HAS_LSE:
        b_lse = tl.where(m_any, b_m + tl.log(tl.where(m_any, b_total, 1.0)), float("-inf"))
        tl.store(p_lse + i_b * stride_eb + i_h * stride_eh, b_lse)
    if HAS_SINK:
        b_sink = tl.load(p_sinks + i_h).to(tl.float32)
        b_new = tl.maximum(b_m, b_sink)
        b_decay = tl.exp(b_m - b_new)
        b_total = b_total * b_decay + tl.exp(b_sink - b_new)
        b_o = b_o * b_decay
    b_o = b_o / tl.where(b_total != 0, b_total, 1.0)
    tl.store(p_out + i_b * stride_ob + i_h * stride_oh + o_d, b_o.to(p_out.dtype.element_ty), mask=o_d < D)


def merge(
    out_parts: Tensor,
    lse_parts: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    splits: int | None = None,
    late_slots: Tensor | None = None,
) -> None:
    """Combine partial attentions over disjoint sets of keys into the attention over their union.

    Launched on the current stream; does not block. Every element of `out` and `lse` is written.

    Args:
        out_parts: fp32 [T, B, Hq, D], last dim contiguous, each part normalised over its own keys.
        lse_parts: fp32 [T, B, Hq], natural log; -inf marks a part without keys, whose out is not read.
        sinks: [Hq] contiguous, any float dtype, or None: an extra logit a head, without a value.
        out: [B, Hq, D] in the model's dtype, last dim contiguous; 0 where there are no keys.
        lse: fp32 [B, Hq] or None to skip; of the keys alone, without the sink; -inf where there are none.
        splits, late_slots: None, or how many parts there always are, and the slots int32 [B, Hkv, S] of loaded blocks
            (-1: not loaded): of the parts from `splits` on only those exist that `attend_loads` wrote for these.
    """
    late_strides, width, per_part = (0, 0), 1, 1
    if late_slots is not None and splits is not None:
        late_strides, width = late_slots.stride()[:2], late_slots.shape[2]
        per_part = blocks_per_part(width, len(out_parts) - splits)
    num_parts, batch, num_q_heads, head_dim = out_parts.shape
    merge_kernel[(batch * num_q_heads,)](
        out_parts, lse_parts, late_slots, sinks, out, lse, num_parts if splits is None else splits,
        *out_parts.stride()[:3], *lse_parts.stride(), out.stride(0), out.stride(1),
        0 if lse is None else lse.stride(0), 0 if lse is None else lse.stride(1),
        *late_strides, H_Q=num_q_heads, G=1 if late_slots is None else num_q_heads // late_slots.shape[1], S=width,
        S_P=triton.next_power_of_2(width), PER_PART=per_part, D=head_dim, BLOCK_T=BLOCK_T,
        BLOCK_D=triton.next_power_of_2(head_dim),
        HAS_SINK=sinks is not None, HAS_LSE=lse is not None, HAS_LATE=late_slots is not None,
        num_warps=NUM_WARPS,
    )  # fmt: skip
