"""rms_norm: every home against fp64, in the model's rounding order, with and without the residual add."""

import pytest
import torch

from csrc_free_kernels.reference.rms_norm import rms_norm as reference
from tests.helpers.homes import homes, poison
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: T, H, dtype, offset, what comes ahead of the norm, whether a norm comes last
CASES = {
    "plain": (3, 80, FP32, 0, "", True),
    "plain-bf16": (1, 4096, BF16, 0, "", True),
    "gemma-fp16": (3, 80, FP16, 1, "", True),
    "residual": (65, 80, FP32, 0, "residual", True),
    "residual-bf16": (3, 4096, BF16, 0, "residual", True),
    "scaled-bf16": (3, 96, BF16, 0, "scaled", True),
    "sandwich": (3, 80, FP32, 1, "sandwich", True),
    "sandwich-bf16": (2, 640, BF16, 1, "sandwich", True),
    "closing-bf16": (3, 80, BF16, 1, "sandwich", False),
}


def inputs(case):
    T, H, dtype, offset, ahead, last = CASES[case]
    # Columns beyond H are poison: x, out and residual are views of wider buffers.
    x, residual = (torch.randn(T, H + 8).to(dtype) for _ in range(2))
    x[:, H:] = residual[:, H:] = torch.nan
    weight, branch = (torch.rand(H).add(0.5).to(dtype) for _ in range(2))
    return (
        x[:, :H],
        weight if last else None,
        residual[:, :H] if ahead else None,
        branch if ahead == "sandwich" else None,
        dict(eps=1e-5, offset=offset, multiplier=0.22 if ahead == "scaled" else 1.0),
    )


def run(fn, device, case, dtype=None):
    """Return what the call leaves in x and out, and the residual it must leave alone."""
    x, weight, residual, branch, options = inputs(case)

    def place(t):
        return None if t is None else t.to(device, dtype or t.dtype, copy=True)

    x = torch.cat([x, torch.full_like(x[:, :8], torch.nan)], 1).to(device, dtype or x.dtype)[:, : x.shape[1]]
    residual = place(residual)
    before = None if residual is None else residual.clone()
    out = None
    if weight is not None:
        wide = poison(x.shape[0], x.shape[1] + 8, dtype=x.dtype, device=device)
        out = wide[:, : x.shape[1]]
    fn(x, place(weight), out, residual=residual, branch_weight=place(branch), **options)
    assert residual is None or torch.equal(residual, before)
    assert out is None or wide[:, x.shape[1] :].isnan().all()
    return x, out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("rms_norm"))
def test_matches_reference(fn, device, case):
    dtype = CASES[case][2]
    torch.manual_seed(0)
    truth = run(reference, "cpu", case, torch.float64)
    torch.manual_seed(0)
    plain = run(reference, "cpu", case)
    torch.manual_seed(0)
    for got, exact, same in zip(run(fn, device, case), truth, plain, strict=True):
        if exact is not None:
            assert_close(got, exact, same, dtype)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("fn", "device"), homes("rms_norm"))
def test_rounds_where_the_model_does(fn, device, offset):
    """fp16 rows come out as the two families write them (the interpreter truncates to bf16, so fp16)."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = (Gemma2RMSNorm if offset else LlamaRMSNorm)(256, eps=1e-6).to(FP16)
    norm.weight.data = torch.rand(256).add(0.5).to(FP16)
    x, residual = torch.randn(8, 256).to(FP16), torch.randn(8, 256).to(FP16)
    expected_x = residual + x
    expected = norm(expected_x).detach()
    out = poison(8, 256, dtype=FP16, device=device)
    x = x.to(device)
    fn(x, norm.weight.data.to(device), out, eps=1e-6, offset=offset, residual=residual.to(device))
    assert torch.equal(x.cpu(), expected_x)
    # The mean may be summed in another order, which moves a few elements by one unit in the last place.
    assert (out.cpu() == expected).float().mean() > 0.995


@pytest.mark.parametrize(("fn", "device"), homes("rms_norm"))
def test_nan_stays_in_its_row(fn, device):
    x, out = torch.randn(2, 80), poison(2, 80, dtype=FP32, device=device)
    x[0, 7] = torch.nan
    fn(x.to(device), torch.ones(80, device=device), out, eps=1e-6, offset=0)
    assert out[0].isnan().all() and out[1].isfinite().all()
