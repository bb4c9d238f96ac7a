"""The one tolerance rule of the test suite (identical everywhere it runs)."""

import torch

# Added to twice the error of plain torch in the test dtype.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """||x - truth|| / ||truth|| in fp64; infinities must sit in the same places with the same sign."""
    x, truth = x.detach().double().cpu(), truth.detach().double().cpu()
    assert x.shape == truth.shape, f"shape {tuple(x.shape)} instead of {tuple(truth.shape)}"
    inf = torch.isinf(truth)
    assert torch.equal(x[inf], truth[inf]), "infinities differ"
    x, truth = x[~inf], truth[~inf]
    assert torch.isfinite(truth).all(), "the truth itself is NaN"
    if not torch.isfinite(x).all():
        return float("inf")
    norm = truth.norm()
    return float((x - truth).norm() / norm) if norm > 0 else float((x - truth).norm())


def assert_close(
    x: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """Pass if err(x) <= 2 * err(plain torch in the same dtype) + floor(dtype).

    Args:
        x: the result under test.
        truth: the fp64 reference from the same rounded inputs.
        same_dtype: the reference code run in the test dtype, or None when it has no error of its own.
        dtype: the dtype of the inputs, which sets the floor.
    """
    error = relative_error(x, truth)
    plain = relative_error(same_dtype, truth) if same_dtype is not None else 0.0
    limit = 2 * plain + FLOOR[dtype]
    assert error <= limit, f"relative error {error:.3e} > {limit:.3e} (plain torch: {plain:.3e})"
