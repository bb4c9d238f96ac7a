"""block_mass: every home against the fp64 reference, and the reference against `attend` block by block."""

import pytest
import torch

from csrc_free_kernels.reference.attend import attend
from csrc_free_kernels.reference.block_mass import block_mass as reference
from tests.helpers.homes import homes, poison
from tests.helpers.tolerance import assert_close
from tests.kernels.test_attend import CASES, inputs

BF16, FP32 = torch.bfloat16, torch.float32


def build(case, *, absent=0.25):
    B, Hkv, G, D, C, S, _, seq_lens, dtype, cap, _ = CASES[case]
    return inputs(B, Hkv, G, D, C, S, seq_lens, dtype, absent=absent), D**-0.5, cap


def lse_of(args, scale, cap):
    """Of the present blocks, from fp64 inputs; rounded as the runtime has it."""
    args = [a.double() if a.is_floating_point() else a for a in args]
    out, lse = torch.zeros(1, *args[0].shape).double(), torch.zeros(1, *args[0].shape[:2]).double()
    attend(*args, out, lse, softmax_scale=scale, soft_cap=cap, window=None)
    return lse[0].float()


def run(fn, device, args, lse, scale, cap):
    q, k, _, *rest = (a.to(device) for a in args)
    wide = torch.float64 if q.dtype == torch.float64 else FP32
    mass = poison(*args[3].shape, dtype=wide, device=device)
    fn(q, k, *rest, lse.to(device, wide), mass, softmax_scale=scale, soft_cap=cap)
    return mass


@pytest.mark.parametrize("case", [name for name in CASES if name != "window"])
@pytest.mark.parametrize(("fn", "device"), homes("block_mass"))
def test_matches_reference(fn, device, case):
    args, scale, cap = build(case)
    lse = lse_of(args, scale, cap)
    exact = [a.double() if a.is_floating_point() else a for a in args]
    truth, plain = run(reference, "cpu", exact, lse, scale, cap), run(reference, "cpu", args, lse, scale, cap)
    assert_close(run(fn, device, args, lse, scale, cap), truth, plain, args[0].dtype)
    assert not truth[args[4] < 0].any()
    present = torch.isfinite(lse).unflatten(1, (args[3].shape[1], -1)).all(2)
    torch.testing.assert_close(truth.sum(-1), present.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("fn", "device"), homes("block_mass"))
def test_part_of_a_larger_softmax(fn, device):
    """Where lse counts more keys than are here, what is here weighs less than 1."""
    args, scale, cap = build("bf16")
    lse = lse_of(args, scale, cap)
    half = run(fn, device, args, lse + 0.6931472, scale, cap)
    torch.testing.assert_close(2 * half, run(fn, device, args, lse, scale, cap))


def test_reference_is_each_block_s_own_lse():
    args, scale, cap = build("ragged-splits")
    q, k, v, ids, slots, lens = (a.double() if a.is_floating_point() else a for a in args)
    lse = lse_of(args, scale, cap)
    mass = run(reference, "cpu", (q, k, v, ids, slots, lens), lse, scale, cap)
    heads, splits = ids.shape[1], ids.shape[2]  # as many splits as blocks: one block each
    out, own = torch.zeros(splits, *q.shape).double(), torch.zeros(splits, *q.shape[:2]).double()
    attend(q, k, v, ids, slots, lens, out, own, softmax_scale=scale, soft_cap=cap, window=None)
    weight = torch.where(own == -torch.inf, 0.0, torch.exp(own - lse))
    torch.testing.assert_close(mass, weight.unflatten(2, (heads, -1)).mean(3).permute(1, 2, 0))
