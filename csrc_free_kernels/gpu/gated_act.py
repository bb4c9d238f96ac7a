"""Gated activation over a merged gate-up projection, one launch."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
NUM_WARPS = 2  # 8 elements a thread: one 16-byte access each for gate and up


@triton.jit
def gated_act_kernel(
    p_x, p_out, stride_x, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr
):
    # Grid (T, ceil(WIDTH / BLOCK)). One program: BLOCK channels of one row. p_x [T, 2 * WIDTH]; p_out [T, WIDTH].
    i_t = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < WIDTH
    dtype: tl.constexpr = p_x.dtype.element_ty
    b_gate = tl.load(p_x + i_t * stride_x + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + i_t * stride_x + WIDTH + o_i, mask=m_i, other=0.0).to(tl.float32)
    b_z = b_gate
    if not SILU:  # 0.5 * (1 + tanh(u)) is sigmoid(2 u), without the cancellation
        b_z = 1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate)
    b_act = (b_gate / (1.0 + tl.exp(-b_z))).to(dtype).to(tl.float32)
    tl.store(p_out + i_t * stride_out + o_i, (b_act * b_up).to(dtype), mask=m_i)


def gated_act(gate_up: Tensor, out: Tensor, *, act: str) -> None:
    """Write act(gate) * up, the activation rounded to the dtype ahead of the product.

    Launched on the current stream; does not block.

    Args:
        gate_up: [T, 2 * I], fp32, bf16 or fp16, last dim contiguous: gate, then up.
        out: [T, I] in the same dtype, last dim contiguous.
        act: `silu` or `gelu_tanh`.

    Raises:
        ValueError: another activation, or fp64.
    """
    if act not in ("silu", "gelu_tanh") or gate_up.itemsize > 4:
        raise ValueError(f"act must be silu or gelu_tanh, not {act!r}, and the dtype not {gate_up.dtype}")
    tokens, width = out.shape
    gated_act_kernel[(tokens, triton.cdiv(width, BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0),
        WIDTH=width, BLOCK=BLOCK, SILU=act == "silu", num_warps=NUM_WARPS,
    )  # fmt: skip
