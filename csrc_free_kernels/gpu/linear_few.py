"""A linear layer of few rows: one launch that streams the weight once.

At most 16 rows are one tile of the tensor core, so a product is as fast as its weight is read. Whether it beats torch
depends on the shape: `launch.few_rows_config` says where it was measured to.
"""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.launch import FEW_ROWS, few_rows_config

DEFAULT = (32, 128, 4, 3)  # where the table says nothing: fits every part in every dtype


@triton.jit(do_not_specialize=["num_rows"])
def linear_few_kernel(
    p_x, p_w, p_out, num_rows, N, stride_x, stride_w, stride_out,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    ADD: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    # Grid (ceil(N / BLOCK_N),). One program: BLOCK_N channels of every row. p_x [M, K]; p_w [N, K]; p_out [M, N].
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    p_w += (o_n.to(tl.int64) * stride_w)[:, None] + o_k[None, :]
    p_x += (o_m * stride_x)[:, None] + o_k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        m_k = i_k + o_k < K
        b_w = tl.load(p_w + i_k, mask=(o_n < N)[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x + i_k, mask=(o_m < num_rows)[:, None] & m_k[None, :], other=0.0)
        if UPCAST_DOT:
            b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
        acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision="ieee")  # of fp32; 16-bit products are exact
    p_out += (o_m * stride_out)[:, None] + o_n[None, :]
    m_out = (o_m < num_rows)[:, None] & (o_n < N)[None, :]
    if ADD:
        acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, acc.to(p_out.dtype.element_ty), mask=m_out)


def linear_few(x: Tensor, weight: Tensor, out: Tensor, *, add: bool) -> None:
    """Write x times weight transposed into out, or add it; accumulated in fp32, rounded once.

    One launch on the current stream, no wait.

    Args:
        x: [M, K], fp32, bf16 or fp16, M up to 16, last dim contiguous.
        weight: [N, K] in the same dtype, last dim contiguous.
        out: [M, N] in the same dtype, last dim contiguous; only written without `add`.
        add: add to what `out` holds.

    Raises:
        ValueError: more rows, different dtypes, fp64, or a strided last dim.
    """
    (rows, k), n = x.shape, weight.shape[0]
    if rows > FEW_ROWS or x.itemsize > 4 or not x.dtype == weight.dtype == out.dtype:
        raise ValueError(f"{rows} rows (at most {FEW_ROWS}) of {x.dtype}, {weight.dtype} and {out.dtype}")
    if not x.stride(1) == weight.stride(1) == out.stride(1) == 1:
        raise ValueError("the last dims must be contiguous")
    block_n, block_k, warps, stages = few_rows_config(n, k, rows, x.itemsize, x.device) or DEFAULT
    linear_few_kernel[(triton.cdiv(n, block_n),)](
        x, weight, out, rows, n, x.stride(0), weight.stride(0), out.stride(0),
        K=k, BLOCK_M=FEW_ROWS, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, ADD=add,
        UPCAST_DOT=not x.is_cuda, num_warps=warps, num_stages=stages,
    )  # fmt: skip
