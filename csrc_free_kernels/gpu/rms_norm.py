"""Root-mean-square norm with the residual add in front of it, one launch."""

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_PER_THREAD = 8  # one 16-byte access each: a single row is pure latency
MAX_WARPS = 16


@triton.jit
def scaled(b_x, b_w, b_square, eps, H: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    # b_x fp32 over the root of its mean square (b_square is the sum over H), times the weight, rounded where the model
    # rounds.
    b_y = b_x * tl.rsqrt(b_square / H + eps)
    b_y = b_y.to(DTYPE).to(tl.float32) * b_w if OFFSET == 0 else b_y * (OFFSET + b_w)
    return b_y.to(DTYPE).to(tl.float32)


@triton.jit
def rms_norm_kernel(
    p_x, p_weight, p_out, p_residual, p_branch, eps, multiplier,
    stride_x, stride_out, stride_residual,
    H: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    # Grid (T,). One program: one row, held in registers. p_x, p_out, p_residual [T, H]; weights [H].
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < H
    dtype: tl.constexpr = p_x.dtype.element_ty
    b_x = tl.load(p_x + i_t * stride_x + o_h, mask=m_h, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        b_w = tl.load(p_branch + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_x = scaled(b_x, b_w, tl.sum(b_x * b_x, 0), eps, H, OFFSET, dtype)
    if HAS_RESIDUAL:
        b_residual = tl.load(p_residual + i_t * stride_residual + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_x = (b_residual + (b_x * multiplier).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    if HAS_RESIDUAL or HAS_BRANCH:
        tl.store(p_x + i_t * stride_x + o_h, b_x.to(dtype), mask=m_h)
    if HAS_OUT:
        b_w = tl.load(p_weight + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_y = scaled(b_x, b_w, tl.sum(b_x * b_x, 0), eps, H, OFFSET, dtype)
        tl.store(p_out + i_t * stride_out + o_h, b_y.to(dtype), mask=m_h)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    *,
    eps: float,
    offset: int,
    residual: Tensor | None = None,
    multiplier: float = 1.0,
    branch_weight: Tensor | None = None,
) -> None:
    """Normalise rows, after adding them to the residual stream if there is one.

    Launched on the current stream; does not block. Arithmetic is fp32; every step is rounded to x's dtype where
    transformers rounds it.

    Args:
        x: [T, H], fp32, bf16 or fp16, last dim contiguous; with `residual` it is overwritten by the new residual
            stream.
        weight: [H] contiguous, or None: no norm at the end.
        out: [T, H] in x's dtype, last dim contiguous, or None with `weight`.
        eps: added to the mean square.
        offset: 0: the normed row is rounded to x's dtype, then times weight (Llama); 1: times 1 + weight in fp32, then
            rounded (Gemma).
        residual: [T, H] or None; only read.
        multiplier: factor on x ahead of the add (Granite).
        branch_weight: [H] or None: norm of x ahead of the add (Gemma's sandwich).

    Raises:
        ValueError: fp64.
    """
    if x.itemsize > 4:
        raise ValueError(f"rms_norm computes in fp32; {x.dtype} would lose digits")
    tokens, width = x.shape
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(tokens,)](
        x, weight, out, residual, branch_weight, eps, multiplier,
        x.stride(0), 0 if out is None else out.stride(0), 0 if residual is None else residual.stride(0),
        H=width, BLOCK=block, OFFSET=offset,
        HAS_BRANCH=branch_weight is not None, HAS_RESIDUAL=residual is not None, HAS_OUT=out is not None,
        num_warps=max(1, min(MAX_WARPS, block // (32 * ELEMENTS_PER_THREAD))),
    )  # fmt: skip
