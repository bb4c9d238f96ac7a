"""A linear layer of few rows, in plain torch."""

import torch
from torch import Tensor


def linear_few(x: Tensor, weight: Tensor, out: Tensor, *, add: bool) -> None:
    """Write x times weight transposed into out, or add it; accumulated in fp32 (fp64 for fp64), rounded once.

    Args:
        x: [M, K], M up to 16.
        weight: [N, K] in the same dtype.
        out: [M, N] in the same dtype; only written without `add`.
        add: add to what `out` holds.

    Raises:
        ValueError: more rows, or different dtypes.
    """
    if x.shape[0] > 16 or not x.dtype == weight.dtype == out.dtype:
        raise ValueError(f"{x.shape[0]} rows (at most 16) of {x.dtype}, {weight.dtype} and {out.dtype}")
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    product = x.to(wide) @ weight.to(wide).T
    out.copy_(product + out if add else product)
