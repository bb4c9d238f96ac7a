"""A candidate for the products of a decode step with at most 16 rows: a Triton kernel that streams the weight once.

Not part of the runtime: it ships only where it clearly beats torch (`python -m bench fused` times both).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MAX_ROWS = 16
Config = tuple[int, int, int, int]
# Output channels per program, input channels per step, warps, steps in flight.
CONFIGS: tuple[Config, ...] = (
    (16, 256, 4, 4),
    (16, 512, 4, 4),
    (32, 128, 4, 6),
    (32, 256, 4, 4),
    (64, 128, 4, 5),
    (64, 256, 8, 4),
)


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_kernel(
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
        acc = tl.dot(b_x, tl.trans(b_w), acc)
    p_out += (o_m * stride_out)[:, None] + o_n[None, :]
    m_out = (o_m < num_rows)[:, None] & (o_n < N)[None, :]
    if ADD:
        acc += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, acc.to(p_out.dtype.element_ty), mask=m_out)


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, config: Config, *, add: bool = False
) -> None:
    """Write x [M, K] times weight [N, K] transposed into out [M, N], or add it; M at most `MAX_ROWS`.

    Launched on the current stream; does not block.

    Raises:
        ValueError: more rows.
    """
    rows, width = x.shape
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows; at most {MAX_ROWS}")
    block_n, block_k, warps, stages = config
    few_rows_kernel[(triton.cdiv(weight.shape[0], block_n),)](
        x, weight, out, rows, weight.shape[0], x.stride(0), weight.stride(0), out.stride(0),
        K=width, BLOCK_M=MAX_ROWS, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, ADD=add,
        UPCAST_DOT=not x.is_cuda, num_warps=warps, num_stages=stages,
    )  # fmt: skip


class FewRows(TorchFunctionMode):
    """While active, the candidate does the products of few rows without a bias, where it has a configuration.

    Works on what the fused forwards call: `F.linear`, and `addmm_` of a transposed weight.
    """

    def __init__(self, configs: Mapping[tuple[int, int], Config]) -> None:
        """Take the configuration of each weight shape (out, in) that the candidate shall do."""
        super().__init__()
        self.configs = configs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and (len(args) < 3 or args[2] is None) and not kwargs:
            x, weight = args[0].reshape(-1, args[0].shape[-1]), args[1]
            config = self.configs.get(tuple(weight.shape)) if x.shape[0] <= MAX_ROWS else None
            if config is not None:
                out = x.new_empty(x.shape[0], weight.shape[0])
                few_rows_linear(x, weight, out, config)
                return out.view(*args[0].shape[:-1], -1)
        if func is torch.Tensor.addmm_ and kwargs.get("alpha", 1.0) == 1.0 and args[0].shape[0] <= MAX_ROWS:
            out, x, weight = args[0], args[1], args[2].t()
            config = self.configs.get(tuple(weight.shape))
            if config is not None:
                few_rows_linear(x, weight, out, config, add=True)
                return out
        return func(*args, **kwargs)
