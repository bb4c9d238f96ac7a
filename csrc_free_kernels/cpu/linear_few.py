"""A linear layer of few rows: BLAS in fp32 over tiles of the weight."""

from torch import Tensor

TILE = 1024  # output channels brought to fp32 at a time, so that a large 16-bit weight never exists twice


def linear_few(x: Tensor, weight: Tensor, out: Tensor, *, add: bool) -> None:
    """Write x times weight transposed into out, or add it; accumulated in fp32, rounded once.

    Allocates one fp32 tile of the weight and of the product at a time.

    Args:
        x: [M, K], fp32, bf16 or fp16, M up to 16.
        weight: [N, K] in the same dtype.
        out: [M, N] in the same dtype; only written without `add`.
        add: add to what `out` holds.

    Raises:
        ValueError: more rows, or different dtypes.
    """
    if x.shape[0] > 16 or not x.dtype == weight.dtype == out.dtype:
        raise ValueError(f"{x.shape[0]} rows (at most 16) of {x.dtype}, {weight.dtype} and {out.dtype}")
    x = x.float()
    for part, target in zip(weight.split(TILE), out.split(TILE, 1), strict=True):
        product = x @ part.float().T
        target.copy_(product.add_(target) if add else product)
