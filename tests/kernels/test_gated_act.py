"""gated_act: every home against fp64, both activations, widths that fill no block."""

import pytest
import torch

from csrc_free_kernels.reference.gated_act import gated_act as reference
from tests.helpers.homes import homes, poison
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# exp of a far gate is inf on purpose; only the interpreter says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

# name: T, I, dtype, activation
CASES = {
    "silu": (3, 80, FP32, "silu"),
    "silu-bf16": (1, 4096, BF16, "silu"),
    "silu-many": (65, 520, FP32, "silu"),
    "gelu": (3, 80, FP32, "gelu_tanh"),
    "gelu-bf16": (3, 1032, BF16, "gelu_tanh"),
    "gelu-fp16": (1, 96, FP16, "gelu_tanh"),
}


def run(fn, device, gate_up, act):
    wide = poison(gate_up.shape[0], gate_up.shape[1] // 2 + 8, dtype=gate_up.dtype, device=device)
    fn(gate_up.to(device), wide[:, :-8], act=act)
    assert wide[:, -8:].isnan().all()
    return wide[:, :-8]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("gated_act"))
def test_matches_reference(fn, device, case):
    T, width, dtype, act = CASES[case]
    gate_up = (4 * torch.randn(T, 2 * width)).to(dtype)
    truth = run(reference, "cpu", gate_up.double(), act)
    assert_close(run(fn, device, gate_up, act), truth, run(reference, "cpu", gate_up, act), dtype)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("fn", "device"), homes("gated_act"))
def test_far_gates(fn, device, act):
    """Gates where exp overflows or vanishes: 0 on the left, the identity on the right."""
    gate_up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4] + [2.0] * 5])
    assert_close(run(fn, device, gate_up, act), torch.tensor([[0.0, 0.0, 0.0, 200.0, 2e4]]), None, FP32)


@pytest.mark.parametrize(("fn", "device"), homes("gated_act"))
def test_unknown_activation_is_refused(fn, device):
    with pytest.raises(ValueError, match="'relu'"):
        fn(torch.zeros(1, 8, device=device), torch.zeros(1, 4, device=device), act="relu")
