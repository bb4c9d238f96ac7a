"""A learned number per token and KV head, from the token's values."""

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # products of a program at once: 8 a thread


# Grid (B * Q, HKV): one number. v [B, HKV, Q, D], weight [HKV, HKV * D] contiguous.
@triton.jit
def token_bias_kernel(
    v, weight, offset, scale, out, num_tokens, stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot,
    HKV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    i_b, i_t = (tl.program_id(0) // num_tokens).to(tl.int64), (tl.program_id(0) % num_tokens).to(tl.int64)
    i_h = tl.program_id(1)
    p_v = v + i_b * stride_vb + i_t * stride_vt
    b_sum = tl.zeros([TILE], tl.float32)
    for first in range(0, HKV * D, TILE):
        o_x = first + tl.arange(0, TILE)
        m_x = o_x < HKV * D
        b_v = tl.load(p_v + (o_x // D).to(tl.int64) * stride_vh + o_x % D, mask=m_x, other=0.0)
        b_w = tl.load(weight + i_h * HKV * D + o_x, mask=m_x, other=0.0)
        b_sum += b_v.to(tl.float32) * b_w.to(tl.float32)
    x = tl.sum(b_sum, 0)
    if HAS_OFFSET:
        x += tl.load(offset + i_h).to(tl.float32)
    softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    bias = tl.load(scale + i_h).to(tl.float32) * softplus
    tl.store(out + i_b * stride_ob + i_h * stride_oh + i_t * stride_ot, bias)


def token_bias(v: Tensor, weight: Tensor, offset: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Compute `scale * softplus(weight v + offset)`, v being the values of all KV heads of a token in a row.

    Arguments as in `csrc_free_kernels/reference/token_bias.py`; the last dim of v is contiguous, as are the tensors
    of the head. Launched on the current stream; does not block.
    """
    assert v.stride(3) == 1 and weight.is_contiguous() and scale.is_contiguous()
    rows, heads, num_tokens, dim = v.shape
    token_bias_kernel[(rows * num_tokens, heads)](
        v, weight, offset, scale, out, num_tokens, *v.stride()[:3], *out.stride(),
        HKV=heads, D=dim, TILE=min(TILE, triton.next_power_of_2(heads * dim)), HAS_OFFSET=offset is not None,
        num_warps=4,
    )  # fmt: skip
