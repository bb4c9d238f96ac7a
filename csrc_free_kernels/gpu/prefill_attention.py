"""Attention of a chunk of queries over one segment of keys, folded into a running result.

The tiling over queries with an online softmax over keys is FlashAttention-2's (arXiv:2307.08691).
"""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.attend import LN2, LOG2E, cap_logits
from csrc_free_kernels.launch import shared_bytes


@triton.jit
def fold_keys(
    b_o, b_l, b_m, b_q, p_k, p_v, o_pos, key_start, key_len, lo, hi, scale, soft_cap, window,
    stride_km, stride_kt, stride_vm, stride_vt, p_bias, bias_scale, stride_bm,
    D: tl.constexpr, KEY_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    # Online softmax over the keys [lo, hi), lo a multiple of BLOCK_N. b_m counts in log2.
    o_d = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        if KEY_BLOCK == 0:
            o_k = o_n.to(tl.int64) * stride_kt
            o_v = o_n.to(tl.int64) * stride_vt
        else:
            o_k = (o_n // KEY_BLOCK).to(tl.int64) * stride_km + (o_n % KEY_BLOCK) * stride_kt
            o_v = (o_n // KEY_BLOCK).to(tl.int64) * stride_vm + (o_n % KEY_BLOCK) * stride_vt
        p_kt = p_k + o_k[:, None] + o_d[None, :]
        p_vt = p_v + o_v[:, None] + o_d[None, :]
        if MASKED:
            m_n = (o_n < key_len) & (o_n + key_start >= 0)
            b_k = tl.load(p_kt, mask=m_n[:, None] & (o_d[None, :] < D), other=0.0)
            b_v = tl.load(p_vt, mask=m_n[:, None] & (o_d[None, :] < D), other=0.0)
        elif D == BLOCK_D:
            b_k = tl.load(p_kt)
            b_v = tl.load(p_vt)
        else:
            b_k = tl.load(p_kt, mask=o_d[None, :] < D, other=0.0)
            b_v = tl.load(p_vt, mask=o_d[None, :] < D, other=0.0)
        if UPCAST_DOT:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_Q, BLOCK_N]
        log2_scale = scale * LOG2E
        if HAS_CAP:
            b_x = cap_logits(b_x * scale, soft_cap)
            log2_scale = LOG2E
        if HAS_BIAS:
            if not HAS_CAP:
                b_x = b_x * scale
                log2_scale = LOG2E
            o_b = o_n.to(tl.int64)
            if KEY_BLOCK > 0:
                o_b = (o_n // KEY_BLOCK).to(tl.int64) * stride_bm + o_n % KEY_BLOCK
            b_bias = tl.load(p_bias + o_b, mask=m_n, other=0.0) if MASKED else tl.load(p_bias + o_b)
            b_x = b_x + bias_scale * b_bias.to(tl.float32)[None, :]
        if MASKED:
            o_kpos = (key_start + o_n)[None, :]
            m_x = m_n[None, :] & (o_kpos <= o_pos[:, None])
            if HAS_WINDOW:
                m_x = m_x & (o_kpos > o_pos[:, None] - window)
            b_x = tl.where(m_x, b_x, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_x, 1) * log2_scale)
        b_shift = b_max
        if MASKED:
            b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_decay = tl.exp2(b_m - b_shift)
        b_p = tl.exp2(b_x * log2_scale - b_shift[:, None])
        b_l = b_l * b_decay + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision="ieee")
        b_m = b_max
    return b_o, b_l, b_m


# Chunk lengths vary: what depends on them is not compiled in.
@triton.jit(do_not_specialize=["num_queries", "stride_lb", "stride_lh"])
def prefill_attention_kernel(
    p_q, p_k, p_v, p_query_start, p_key_start, p_key_len, p_out, p_lse, num_queries, scale, soft_cap, window,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_km, stride_kt,
    stride_vb, stride_vh, stride_vm, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt,
    p_bias, bias_scale, stride_bb, stride_bh, stride_bm,
    H_Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr, KEY_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    # Grid (B * Hq, ceil(Q / BLOCK_Q)). One program: BLOCK_Q queries of one head over all keys they see.
    # p_q, p_out [B, Hq, Q, D]; p_k, p_v [B, Hkv, M, KEY_BLOCK, D] (0: M is 1); p_lse [B, Hq, Q];
    # p_bias [B, Hkv, M, KEY_BLOCK] or None.
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // H_Q
    i_h = i_bh % H_Q
    i_q = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_Q  # the tiles with most keys start first
    o_q = i_q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_q = o_q < num_queries
    m_qd = m_q[:, None] & (o_d[None, :] < D)
    query_start = tl.load(p_query_start + i_b)
    key_start = tl.load(p_key_start + i_b)
    key_len = tl.load(p_key_len + i_b)

    # Keys [lo, hi) are seen by some query of the tile, [full_lo, full_hi) by all: only the rest is masked.
    first = query_start + i_q
    last = query_start + tl.minimum(i_q + BLOCK_Q, num_queries) - 1
    lo = tl.maximum(0, -key_start)
    hi = tl.minimum(key_len, last + 1 - key_start)
    full_lo = lo
    if HAS_WINDOW:
        full_lo = tl.maximum(lo, last - window + 1 - key_start)
        lo = tl.maximum(lo, first - window + 1 - key_start)
    lo = lo // BLOCK_N * BLOCK_N
    full_lo = tl.minimum(tl.cdiv(full_lo, BLOCK_N) * BLOCK_N, tl.maximum(tl.cdiv(hi, BLOCK_N) * BLOCK_N, lo))
    full_hi = tl.maximum(tl.minimum(hi, first + 1 - key_start) // BLOCK_N * BLOCK_N, full_lo)
    if lo >= hi:
        return

    p_q += i_b * stride_qb + i_h * stride_qh
    b_q = tl.load(p_q + o_q.to(tl.int64)[:, None] * stride_qt + o_d[None, :], mask=m_qd, other=0.0)
    if UPCAST_DOT:
        b_q = b_q.to(tl.float32)
    p_k += i_b * stride_kb + i_h // G * stride_kh
    p_v += i_b * stride_vb + i_h // G * stride_vh
    if HAS_BIAS:
        p_bias += i_b * stride_bb + i_h // G * stride_bh
    o_pos = query_start + o_q

    # The result so far is one more key: weight 1, value out, logit lse.
    p_l = p_lse + i_b * stride_lb + i_h * stride_lh + o_q.to(tl.int64) * stride_lt
    p_o = p_out + i_b * stride_ob + i_h * stride_oh + o_q.to(tl.int64)[:, None] * stride_ot + o_d[None, :]
    b_m = tl.load(p_l, mask=m_q, other=float("-inf")) * LOG2E
    b_l = (b_m != float("-inf")).to(tl.float32)  # NaN included: it must reach the result
    b_o = tl.load(p_o, mask=m_qd & (b_l > 0)[:, None], other=0.0)
    b_o, b_l, b_m = fold_keys(
        b_o, b_l, b_m, b_q, p_k, p_v, o_pos, key_start, key_len, lo, full_lo, scale, soft_cap, window,
        stride_km, stride_kt, stride_vm, stride_vt, p_bias, bias_scale, stride_bm,
        D, KEY_BLOCK, BLOCK_N, BLOCK_D, True, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
    )  # fmt: skip
    b_o, b_l, b_m = fold_keys(
        b_o, b_l, b_m, b_q, p_k, p_v, o_pos, key_start, key_len, full_lo, full_hi, scale, soft_cap, window,
        stride_km, stride_kt, stride_vm, stride_vt, p_bias, bias_scale, stride_bm,
        D, KEY_BLOCK, BLOCK_N, BLOCK_D, False, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
    )  # fmt: skip
    b_o, b_l, b_m = fold_keys(
        b_o, b_l, b_m, b_q, p_k, p_v, o_pos, key_start, key_len, full_hi, hi, scale, soft_cap, window,
        stride_km, stride_kt, stride_vm, stride_vt, p_bias, bias_scale, stride_bm,
        D, KEY_BLOCK, BLOCK_N, BLOCK_D, True, HAS_CAP, HAS_WINDOW, HAS_BIAS, UPCAST_DOT,
    )  # fmt: skip

    b_l = tl.where(b_l != 0, b_l, 1.0)
    tl.store(p_o, b_o / b_l[:, None], mask=m_qd)
    tl.store(p_l, (b_m + tl.log2(b_l)) * LN2, mask=m_q)


def tiles(block_d: int, item_bytes: int, num_queries: int, shared_bytes: int) -> tuple[int, int, int, int]:
    """Choose (BLOCK_Q, BLOCK_N, num_warps, num_stages) so that the tiles fit registers and shared memory.

    Args:
        block_d: head dim rounded up to a power of two.
        item_bytes: bytes an element of q, k and v.
        num_queries: queries of the chunk.
        shared_bytes: shared memory that one program may use.
    """
    if item_bytes == 4:  # no tensor cores: fp32 dots keep whole operands in registers, more rows would spill
        return 16, 32, 8, 2
    block_q, block_n, num_warps, num_stages = 128, 64, 8, 3
    if block_d == 256:
        if shared_bytes > 200_000:
            num_stages = 2
        else:
            block_q, block_n, num_stages = 64, 32, 3 if shared_bytes > 120_000 else 2
    small = max(16, triton.next_power_of_2(num_queries))
    if small < block_q:
        block_q, num_warps = small, 8 if block_d == 256 else 4
    return block_q, block_n, num_warps, num_stages


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    key_len: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
    bias: Tensor | None = None,
    bias_scale: float = 1.0,
) -> None:
    """Fold the causal attention of a query chunk over one key segment into `(out, lse)`.

    Launched on the current stream; does not block. Dots run in the dtype of q with fp32 accumulation.

    Args:
        q: [B, Hq, Q, D], last dim contiguous; query i is at query_start[b] + i. Negative positions see
            nothing.
        k: [B, Hkv, M, C', D], last dim contiguous; key j is [j // C', j % C'] at position
            key_start[b] + j. A plain chunk is M = 1.
        v: [B, Hkv, M, C', D], last dim contiguous.
        query_start: int32 [B], positions.
        key_start: int32 [B], positions.
        key_len: int32 [B], keys of the segment that exist; those at negative positions do not. The rest may
            hold anything.
        out: fp32 [B, Hq, Q, D], last dim contiguous, the result so far (0 at first), updated in place.
        lse: fp32 [B, Hq, Q], natural log, the result so far (-inf at first), updated in place.
        softmax_scale: factor on q.k, positive.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap).
        window: None, or a query sees only the last `window` positions up to its own.
        bias: [B, Hkv, M, C'], last dim contiguous, or None: a number per key; `bias_scale` times it is added to
            the (capped) logit.
        bias_scale: factor on the bias.
    """
    batch, num_q_heads, num_queries, head_dim = q.shape
    block_d, on_cpu = triton.next_power_of_2(head_dim), q.device.type == "cpu"
    block_q, block_n, num_warps, num_stages = tiles(
        block_d, q.element_size(), num_queries, shared_bytes(q.device)
    )
    prefill_attention_kernel[(batch * num_q_heads, triton.cdiv(num_queries, block_q))](
        q, k, v, query_start, key_start, key_len, out, lse,
        num_queries, softmax_scale, 1.0 if soft_cap is None else soft_cap, 0 if window is None else window,
        *q.stride()[:3], *k.stride()[:4], *v.stride()[:4], *out.stride()[:3], *lse.stride(),
        bias, bias_scale, *((0, 0, 0) if bias is None else bias.stride()[:3]),
        H_Q=num_q_heads, G=num_q_heads // k.shape[1], D=head_dim,
        KEY_BLOCK=0 if k.shape[2] == 1 else k.shape[3],
        BLOCK_Q=block_q, BLOCK_N=block_n, BLOCK_D=block_d,
        HAS_CAP=soft_cap is not None, HAS_WINDOW=window is not None, HAS_BIAS=bias is not None,
        UPCAST_DOT=on_cpu,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
