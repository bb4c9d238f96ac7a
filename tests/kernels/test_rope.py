"""rope: every home against fp64 on strided views of a merged projection, with and without per-head norms."""

import pytest
import torch

from csrc_free_kernels.reference.rope import rope as reference
from tests.helpers.homes import homes
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: T, A (rows of angles), Hq, Hkv, D, R, dtype, offset of the norms or None
CASES = {
    "d64": (3, 3, 4, 2, 64, 64, FP32, None),
    "one-token-d128-bf16": (1, 1, 32, 8, 128, 128, BF16, None),
    "d80-mqa": (2, 2, 7, 1, 80, 80, FP32, None),
    "d256-fp16": (2, 2, 4, 2, 256, 256, FP16, None),
    "shared-angles": (6, 3, 3, 3, 64, 64, FP32, None),
    "partial": (3, 3, 4, 2, 96, 48, FP32, None),
    "many-tokens": (65, 65, 2, 1, 64, 64, BF16, None),
    "normed-bf16": (3, 3, 5, 2, 128, 128, BF16, 0),
    "normed-gemma": (3, 1, 4, 1, 256, 256, FP32, 1),
    "normed-gemma-bf16": (2, 2, 4, 1, 80, 80, BF16, 1),
}


def inputs(case):
    T, A, Hq, Hkv, D, R, dtype, offset = CASES[case]
    qkv = torch.randn(T, Hq + 2 * Hkv, D).to(dtype)
    angles = torch.randn(A, R // 2).repeat(1, 2) * 3
    weights = (None, None) if offset is None else tuple(torch.rand(D).add(0.5).to(dtype) for _ in range(2))
    return qkv, angles.cos().to(dtype), angles.sin().to(dtype), weights, dict(eps=1e-6, offset=offset or 0)


def run(fn, device, case, dtype=None):
    """Return the whole merged buffer after the call."""
    torch.manual_seed(1)
    Hq, Hkv = CASES[case][2:4]
    qkv, cos, sin, weights, options = inputs(case)
    dtype = dtype or qkv.dtype
    merged = qkv.to(device, dtype, copy=True)
    weights = [None if w is None else w.to(device, dtype) for w in weights]
    q, k = merged[:, :Hq], merged[:, Hq : Hq + Hkv]
    fn(q, k, cos.to(device, dtype), sin.to(device, dtype), *weights, **options)
    assert torch.equal(merged[:, Hq + Hkv :].cpu(), qkv[:, Hq + Hkv :].to(dtype)), "values were touched"
    return merged


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("rope"))
def test_matches_reference(fn, device, case):
    truth = run(reference, "cpu", case, torch.float64)
    assert_close(run(fn, device, case), truth, run(reference, "cpu", case), CASES[case][6])


@pytest.mark.parametrize(("fn", "device"), homes("rope"))
def test_rounds_where_the_model_does(fn, device):
    """fp16 heads come out bit for bit as the model's own function turns them (the interpreter truncates bf16)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(5, 4, 64).to(FP16), torch.randn(5, 2, 64).to(FP16)
    angles = (torch.randn(5, 32) * 9).repeat(1, 2)
    cos, sin = angles.cos().to(FP16), angles.sin().to(FP16)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    got = q.to(device, copy=True), k.to(device, copy=True)
    fn(*got, cos.to(device), sin.to(device))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_norms_of_partly_rotated_heads_are_refused():
    from csrc_free_kernels.gpu.rope import rope

    x, angles = torch.randn(2, 2, 64), torch.randn(2, 32)
    with pytest.raises(ValueError, match="R \\(32\\)"):
        rope(x, x, angles, angles, torch.ones(64), torch.ones(64))
