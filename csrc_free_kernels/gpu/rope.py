"""Rotary position embedding of queries and keys in place, their per-head norms in front, one launch."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.rms_norm import scaled

NUM_WARPS = 2
TILE = 512  # elements of one half that a program turns: 8 a thread, one 16-byte access


@triton.jit
def turn_heads(
    p_x, p_weight, i_h, b_c1, b_c2, b_s1, b_s2, eps, stride_h,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    # BLOCK_H heads of one token: p_x [H, D] with head stride stride_h. Products and sum are rounded one by one.
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_HALF)
    m_x = (o_h[:, None] < H) & (o_d[None, :] < HALF)
    p_1 = p_x + o_h[:, None] * stride_h + o_d[None, :]
    dtype: tl.constexpr = p_x.dtype.element_ty
    b_1 = tl.load(p_1, mask=m_x, other=0.0).to(tl.float32)
    b_2 = tl.load(p_1 + HALF, mask=m_x, other=0.0).to(tl.float32)
    if HAS_NORM:
        o_w = tl.zeros([BLOCK_H], tl.int32)[:, None] + o_d[None, :]
        b_w1 = tl.load(p_weight + o_w, mask=o_w < HALF, other=0.0).to(tl.float32)
        b_w2 = tl.load(p_weight + HALF + o_w, mask=o_w < HALF, other=0.0).to(tl.float32)
        b_square = tl.sum(b_1 * b_1 + b_2 * b_2, 1, keep_dims=True)
        b_1 = scaled(b_1, b_w1, b_square, eps, D, OFFSET, dtype)
        b_2 = scaled(b_2, b_w2, b_square, eps, D, OFFSET, dtype)
    b_left = (b_1 * b_c1).to(dtype).to(tl.float32) - (b_2 * b_s1).to(dtype).to(tl.float32)
    b_right = (b_2 * b_c2).to(dtype).to(tl.float32) + (b_1 * b_s2).to(dtype).to(tl.float32)
    tl.store(p_1, b_left.to(dtype), mask=m_x)
    tl.store(p_1 + HALF, b_right.to(dtype), mask=m_x)


@triton.jit(do_not_specialize=["num_angles"])  # 1 for a single row: no second kernel to compile for it
def rope_kernel(
    p_q, p_k, p_cos, p_sin, p_q_weight, p_k_weight, eps, num_angles,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_c, stride_s,
    H_Q: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr,
    HAS_NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    # Grid (T, ceil(Hq / BLOCK_H) + ceil(Hkv / BLOCK_H)). One program: BLOCK_H query or key heads of one token.
    # p_q [T, Hq, D]; p_k [T, Hkv, D]; p_cos, p_sin [A, 2 * HALF]; weights [D].
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    i_a = i_t % num_angles
    # Every head's row reads the same angles: from L1, which costs less than spreading one row through shared memory.
    o_d = tl.zeros([BLOCK_H], tl.int32)[:, None] + tl.arange(0, BLOCK_HALF)[None, :]
    m_d = o_d < HALF
    p_c = p_cos + i_a * stride_c + o_d
    p_s = p_sin + i_a * stride_s + o_d
    b_c1 = tl.load(p_c, mask=m_d, other=0.0).to(tl.float32)
    b_c2 = tl.load(p_c + HALF, mask=m_d, other=0.0).to(tl.float32)
    b_s1 = tl.load(p_s, mask=m_d, other=0.0).to(tl.float32)
    b_s2 = tl.load(p_s + HALF, mask=m_d, other=0.0).to(tl.float32)
    num_q: tl.constexpr = (H_Q + BLOCK_H - 1) // BLOCK_H
    if i_h < num_q:
        turn_heads(
            p_q + i_t * stride_qt, p_q_weight, i_h, b_c1, b_c2, b_s1, b_s2, eps, stride_qh,
            H_Q, D, HALF, OFFSET, HAS_NORM, BLOCK_H, BLOCK_HALF,
        )  # fmt: skip
    else:
        turn_heads(
            p_k + i_t * stride_kt, p_k_weight, i_h - num_q, b_c1, b_c2, b_s1, b_s2, eps, stride_kh,
            H_KV, D, HALF, OFFSET, HAS_NORM, BLOCK_H, BLOCK_HALF,
        )  # fmt: skip


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 0.0,
    offset: int = 0,
) -> None:
    """Rotate the halves of every head of `q` and `k` in place.

    Launched on the current stream; does not block. Rounded to q's dtype where transformers rounds.

    Args:
        q: [T, Hq, D], fp32, bf16 or fp16, last dim contiguous (a view of a merged projection), overwritten.
        k: [T, Hkv, D], the same.
        cos: [A, R], R <= D even; T is a multiple of A and token t takes row t % A. Channels from R on pass through.
        sin: [A, R].
        q_weight: [D] or None: RMS norm of every query head ahead of the rotation (then R == D), as `rms_norm`.
        k_weight: [D], with `q_weight`.
        eps: of the norms.
        offset: of the norms.

    Raises:
        ValueError: fp64, or norms beside channels that pass through.
    """
    tokens, num_q_heads, head_dim = q.shape
    angles, rotary_dim = cos.shape
    if q.itemsize > 4 or (q_weight is not None and rotary_dim != head_dim):
        raise ValueError(f"rope takes no {q.dtype}, and norms only with R ({rotary_dim}) == D ({head_dim})")
    half = rotary_dim // 2
    block_half = triton.next_power_of_2(half)
    block_h = min(triton.next_power_of_2(num_q_heads), max(1, TILE // block_half))
    programs = triton.cdiv(num_q_heads, block_h) + triton.cdiv(k.shape[1], block_h)
    rope_kernel[(tokens, programs)](
        q, k, cos, sin, q_weight, k_weight, eps, angles,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), sin.stride(0),
        H_Q=num_q_heads, H_KV=k.shape[1], D=head_dim, HALF=half, OFFSET=offset,
        HAS_NORM=q_weight is not None, BLOCK_H=block_h, BLOCK_HALF=block_half,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # else the compiler makes half-precision fused products, which round once less
    )  # fmt: skip
