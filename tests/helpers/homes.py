"""The homes of an op that can run here, as pytest parameters."""

import importlib

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def homes(op: str):
    """Return (function, device) parameters for Triton (interpreted without a GPU) and numba."""
    gpu = getattr(importlib.import_module(f"csrc_free_kernels.gpu.{op}"), op)
    cpu = getattr(importlib.import_module(f"csrc_free_kernels.cpu.{op}"), op)
    return [pytest.param(gpu, DEVICE, id="triton"), pytest.param(cpu, "cpu", id="numba")]


def poison(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """An output buffer that shows every element nobody wrote: NaN for floats, a marker for integers."""
    value = float("nan") if dtype.is_floating_point else -77
    return torch.full(shape, value, dtype=dtype, device=device)
