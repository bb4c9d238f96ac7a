"""The last parts of a step's attention, and the merge of all of them, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.attend import attend_sizes, attend_split, store_part
from csrc_free_kernels.gpu.merge import merge_heads
from csrc_free_kernels.gpu.score_mean import arrive

MERGE_ELEMENTS = 4096  # of the parts that a program merges at once: 32 registers a thread


# Grid (B * Hkv, T - first_part). Shapes as in the contract. Where a (row, KV head) has no blocks here, its
# programs share the merging of its heads and wait for nobody; else the last of them to attend does it.
@triton.jit(do_not_specialize=["first_part"])
def attend_merge_kernel(
    p_q, p_k, p_v, p_ids, p_slots, p_seq_lens, first_part, p_parts, p_lse_parts, p_arrivals, p_sinks, p_out, p_lse,
    softmax_scale, soft_cap, window,
    stride_qb, stride_qh, stride_k, stride_v, stride_ib, stride_ih, stride_sb, stride_sh,
    stride_pt, stride_pb, stride_ph, stride_lt, stride_lb, stride_lh, stride_ob, stride_oh, stride_eb, stride_eh,
    H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    ALL_S: tl.constexpr, G_P: tl.constexpr, BLOCK_T: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_LSE: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    i_b = i_bh // H_KV
    i_h = i_bh % H_KV
    p_slots += i_b * stride_sb + i_h * stride_sh
    p_parts += i_b * stride_pb
    p_lse_parts += i_b * stride_lb
    p_out += i_b * stride_ob
    if HAS_LSE:
        p_lse += i_b * stride_eb
    last = (i_h + 1) * G
    o_s = tl.arange(0, ALL_S)
    if tl.max(tl.load(p_slots + o_s, mask=o_s < S, other=-1), 0) < 0:
        SHARE: tl.constexpr = (G + T - 1) // T
        HEADS: tl.constexpr = triton.next_power_of_2(SHARE)
        merge_heads(
            p_parts, p_lse_parts, p_sinks, p_out, p_lse, i_h * G + i_t * HEADS, last, first_part,
            stride_pt, stride_ph, stride_lt, stride_lh, stride_oh, stride_eh,
            D, HEADS, BLOCK_T // HEADS, BLOCK_D, HAS_SINK, HAS_LSE,
        )  # fmt: skip
    else:
        b_o, b_lse = attend_split(
            p_q, p_k, p_v, p_ids + i_b * stride_ib + i_h * stride_ih, p_slots, p_seq_lens,
            softmax_scale, soft_cap, window, i_b, i_h, i_t, stride_qb, stride_qh, stride_k, stride_v,
            G, D, C, S, T, BLOCK_G, BLOCK_D, BLOCK_C, BLOCK_S, HAS_CAP, HAS_WINDOW, UPCAST_DOT,
        )  # fmt: skip
        i_part = (first_part + i_t).to(tl.int64)
        p_own, p_own_lse = p_parts + i_part * stride_pt, p_lse_parts + i_part * stride_lt
        store_part(p_own, p_own_lse, b_o, b_lse, i_h, stride_ph, stride_lh, G, D, BLOCK_G, BLOCK_D)
        if arrive(p_arrivals + i_bh):
            merge_heads(
                p_parts, p_lse_parts, p_sinks, p_out, p_lse, i_h * G, last, first_part + T,
                stride_pt, stride_ph, stride_lt, stride_lh, stride_oh, stride_eh,
                D, G_P, BLOCK_T // G_P, BLOCK_D, HAS_SINK, HAS_LSE,
            )  # fmt: skip


def attend_merge(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_ids: Tensor,
    block_slots: Tensor,
    seq_lens: Tensor,
    first_part: int,
    out_parts: Tensor,
    lse_parts: Tensor,
    arrivals: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
) -> None:
    """Attend to the blocks that have a slot, then merge all parts, also those written before.

    Arguments as in `csrc_free_kernels/reference/attend_merge.py`; the last dim of q, out_parts and out is
    contiguous, as are `sinks` and `arrivals`. One launch on the current stream, no wait.
    """
    num_parts, batch, num_kv_heads = out_parts.shape[0], q.shape[0], block_ids.shape[1]
    splits, group = num_parts - first_part, out.shape[1] // num_kv_heads
    sizes = attend_sizes(q, k_pool, block_ids, splits)
    if first_part > 0:  # what comes late is little: more programs at once count for more than deep buffers
        sizes["num_stages"] = 2
    pooled, block_d = triton.next_power_of_2(group), sizes["BLOCK_D"]
    attend_merge_kernel[(batch * num_kv_heads, splits)](
        q, k_pool, v_pool, block_ids, block_slots, seq_lens, first_part, out_parts, lse_parts, arrivals, sinks,
        out, lse, softmax_scale, 1.0 if soft_cap is None else soft_cap, 0 if window is None else window,
        *q.stride()[:2], k_pool.stride(0), v_pool.stride(0), *block_ids.stride()[:2], *block_slots.stride()[:2],
        *out_parts.stride()[:3], *lse_parts.stride(), *out.stride()[:2], *((0, 0) if lse is None else lse.stride()),
        **sizes, ALL_S=triton.next_power_of_2(block_ids.shape[2]), G_P=pooled,
        BLOCK_T=pooled * min(triton.next_power_of_2(num_parts), max(1, MERGE_ELEMENTS // (pooled * block_d))),
        HAS_CAP=soft_cap is not None, HAS_WINDOW=window is not None,
        HAS_SINK=sinks is not None, HAS_LSE=lse is not None,
    )  # fmt: skip
