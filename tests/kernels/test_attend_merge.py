"""attend_merge: every home against attend and merge in fp64, whatever parts were there before."""

import pytest
import torch

from csrc_free_kernels.reference.attend import attend
from csrc_free_kernels.reference.attend_merge import attend_merge as reference
from tests.helpers.homes import homes, poison
from tests.helpers.tolerance import assert_close
from tests.kernels.test_attend import inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: Hkv, G, D, C, S, parts before, parts here, seq_lens, dtype, soft_cap, window, sinks, share of absent blocks
CASES = {
    "one-token": (1, 1, 64, 16, 2, 0, 1, [1], FP32, None, None, False, 0.25),
    "ring": (2, 4, 64, 16, 5, 0, 2, [70, 0, 33], FP32, None, 21, True, 0.0),
    "few-misses": (2, 4, 64, 16, 5, 3, 2, [70, 0, 33, 16], FP32, None, None, False, 0.8),
    "no-misses": (2, 7, 80, 16, 5, 3, 2, [70, 0], FP32, None, None, True, 1.0),
    "no-misses-nothing-before": (1, 3, 64, 16, 3, 0, 2, [40, 0], FP32, None, None, True, 1.0),
    "more-parts-than-heads": (1, 2, 64, 16, 8, 2, 5, [120, 7], FP32, 30.0, None, False, 0.5),
    "many-parts": (1, 2, 64, 16, 4, 70, 2, [60], FP32, None, None, True, 0.5),
    "bf16": (2, 8, 128, 64, 3, 2, 2, [190, 65], BF16, None, None, True, 0.4),
    "bf16-wide-head": (1, 4, 256, 16, 4, 1, 1, [63], BF16, None, 40, False, 0.2),
    "fp16-wide-group": (1, 20, 64, 16, 4, 1, 2, [50], FP16, 5.0, None, False, 0.5),
}


def build(case: str):
    heads, group, dim, size, width, before, here, seq_lens, dtype, cap, window, sink, absent = CASES[case]
    q, k, v, ids, slots, lens = inputs(
        len(seq_lens), heads, group, dim, size, width, seq_lens, dtype, absent=absent
    )
    if absent == 1.0:
        slots.fill_(-1)
    parts = torch.full((before + here, *q.shape), torch.nan)
    lses = torch.full((before + here, *q.shape[:2]), torch.nan)
    parts[:before], lses[:before] = torch.randn(before, *q.shape), 2 * torch.randn(before, *q.shape[:2])
    empty = torch.rand(before, *q.shape[:2]) < 0.3
    lses[:before][empty], parts[:before][empty] = -torch.inf, torch.nan
    sinks = torch.randn(heads * group).to(dtype) if sink else None
    kw = {"softmax_scale": dim**-0.5, "soft_cap": cap, "window": window}
    return (q, k, v, ids, slots, lens, before, parts, lses, sinks), kw


def run(fn, device, args, kw, *, with_lse=True):
    """Returns out and lse."""
    *head, before, parts, lses, sinks = (
        t.to(device, copy=True) if isinstance(t, torch.Tensor) else t for t in args
    )
    q, ids = head[0], head[3]
    arrivals = torch.zeros(ids.shape[:2], dtype=torch.int32, device=device)
    out = poison(*q.shape, dtype=q.dtype, device=device)
    lse = poison(*q.shape[:2], dtype=lses.dtype, device=device) if with_lse else None
    untouched = parts[:before].clone()
    fn(*head, before, parts, lses, arrivals, sinks, out, lse, **kw)
    assert not arrivals.any(), "the counters are left at zero for the next call"
    assert torch.equal(parts[:before].nan_to_num(), untouched.nan_to_num())
    return out, lse


def widen(args):
    return tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("attend_merge"))
def test_matches_reference(fn, device, case):
    args, kw = build(case)
    truth, plain = run(reference, "cpu", widen(args), kw), run(reference, "cpu", args, kw)
    got = run(fn, device, args, kw)
    for x, exact, same in zip(got, truth, plain, strict=True):
        assert_close(x, exact, same, args[0].dtype)
    assert torch.equal(run(fn, device, args, kw, with_lse=False)[0], got[0])


@pytest.mark.parametrize(("fn", "device"), homes("attend_merge"))
def test_parts_that_attend_wrote(fn, device):
    """Hits by `attend`, misses here: together all blocks, as if nothing had been missing."""
    q, k, v, ids, slots, lens = inputs(2, 2, 4, 64, 16, 6, [90, 40], FP32, absent=0)
    kw = {"softmax_scale": 0.125, "soft_cap": None, "window": None}
    miss = (torch.rand(slots.shape) < 0.4) & (slots >= 0)
    parts, lses = (
        poison(5, *q.shape, dtype=FP32, device="cpu"),
        poison(5, *q.shape[:2], dtype=FP32, device="cpu"),
    )
    attend(q, k, v, ids, slots.masked_fill(miss, -1), lens, parts[:3], lses[:3], **kw)
    args = (q, k, v, ids, slots.masked_fill(~miss, -1), lens, 3, parts, lses, None)
    whole = (q, k, v, ids, slots, lens, 0, parts.clone(), lses.clone(), None)
    truth = run(reference, "cpu", widen(whole), kw)
    for x, exact in zip(run(fn, device, args, kw), truth, strict=True):
        assert_close(x, exact, None, FP32)


@pytest.mark.parametrize(("fn", "device"), homes("attend_merge"))
def test_strided_outputs(fn, device):
    """Parts are a slice of a larger buffer, out is a view of the layer's output, q one of a fused projection."""
    args, kw = build("few-misses")
    truth = run(reference, "cpu", widen(args), kw)
    q, *head, before, parts, lses, _ = (t.to(device) if isinstance(t, torch.Tensor) else t for t in args)
    buffer = torch.cat([poison(2, *q.shape, dtype=FP32, device=device), parts])
    wide = poison(*q.shape[:2], 2, q.shape[2], dtype=FP32, device=device)
    arrivals = torch.zeros(head[2].shape[:2], dtype=torch.int32, device=device)
    q = torch.stack([q, q], 2)[:, :, 1]
    fn(q, *head, before, buffer[2:], lses, arrivals, None, wide[:, :, 1], None, **kw)
    assert_close(wide[:, :, 1], truth[0], None, FP32)
    assert wide[:, :, 0].isnan().all() and buffer[:2].isnan().all()


@pytest.mark.parametrize(("fn", "device"), homes("attend_merge"))
def test_nan_reaches_the_result(fn, device):
    args, kw = build("few-misses")
    args[7][0, 0, 0], args[8][0, 0, 0] = torch.nan, torch.nan
    out, lse = run(fn, device, args, kw)
    assert torch.isnan(out[0, 0]).all() and torch.isnan(lse[0, 0])
    assert torch.isfinite(out[0, 1:]).all()
