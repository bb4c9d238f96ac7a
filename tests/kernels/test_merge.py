"""merge: every home against the fp64 reference, with empty parts, sinks and rows without keys."""

import pytest
import torch

from csrc_free_kernels.reference.merge import merge as reference
from tests.helpers.homes import homes, poison
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: T, B, Hq, D, dtype, sink, empty share
CASES = {
    "one-part": (1, 2, 3, 64, FP32, False, 0.3),
    "two-parts": (2, 2, 4, 80, FP32, False, 0.4),
    "many-parts": (19, 1, 2, 128, FP32, False, 0.5),
    "sink": (3, 2, 4, 64, FP32, True, 0.4),
    "all-empty": (3, 1, 2, 64, FP32, False, 1.0),
    "all-empty-sink": (3, 1, 2, 64, FP32, True, 1.0),
    "bf16": (4, 2, 7, 128, BF16, True, 0.3),
    "bf16-wide-head": (2, 1, 4, 256, BF16, False, 0.3),
    "fp16": (3, 1, 4, 96, FP16, True, 0.3),
}


def run(fn, device, parts, lses, sinks, dtype, *, with_lse=True):
    _, B, Hq, D = parts.shape
    out = poison(B, Hq, D, dtype=dtype, device=device)
    lse = poison(B, Hq, dtype=parts.dtype, device=device) if with_lse else None
    fn(parts.to(device), lses.to(device), None if sinks is None else sinks.to(device), out, lse)
    return out, lse


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("merge"))
def test_matches_reference(fn, device, case):
    T, B, Hq, D, dtype, sink, empty = CASES[case]
    parts, lses = torch.randn(T, B, Hq, D), 3 * torch.randn(T, B, Hq)
    none = torch.rand(T, B, Hq) < empty
    lses[none] = -torch.inf
    parts[none] = torch.nan  # an empty part is not read
    sinks = torch.randn(Hq).to(dtype) if sink else None

    truth = run(reference, "cpu", parts.double(), lses.double(), sinks, torch.float64)
    plain = run(reference, "cpu", parts, lses, sinks, dtype)
    for got, exact, same in zip(run(fn, device, parts, lses, sinks, dtype), truth, plain, strict=True):
        assert_close(got, exact, same, dtype)
    without, _ = run(fn, device, parts, lses, sinks, dtype, with_lse=False)
    assert_close(without, truth[0], plain[0], dtype)
    if empty == 1.0:
        assert not truth[0].any() and (truth[1] == -torch.inf).all()


@pytest.mark.parametrize(("fn", "device"), homes("merge"))
def test_late_parts_count_where_blocks_were_loaded(fn, device):
    """Two parts always, up to three more for seven blocks: the ones that nobody wrote are not looked at."""
    parts, lses = torch.randn(5, 2, 6, 64), torch.randn(5, 2, 6)
    late = torch.full((2, 2, 7), -1, dtype=torch.int32)
    late[0, 0, 2], late[0, 1, :4], late[1, 1] = 5, 9, 1
    expected, written = (parts.clone(), lses.clone()), torch.tensor([[3, 4], [2, 5]]).repeat_interleave(3, 1)
    for b in range(2):
        for h in range(6):
            expected[1][written[b, h] :, b, h] = -torch.inf
            parts[written[b, h] :, b, h], lses[written[b, h] :, b, h] = torch.nan, torch.nan
    truth = run(reference, "cpu", expected[0].double(), expected[1].double(), None, torch.float64)
    for merge in (fn, reference):
        at = device if merge is fn else "cpu"
        out, lse = poison(2, 6, 64, dtype=FP32, device=at), poison(2, 6, dtype=FP32, device=at)
        merge(parts.to(at), lses.to(at), None, out, lse, splits=2, late_slots=late.to(at))
        assert_close(out, truth[0], None, FP32)
        assert_close(lse, truth[1], None, FP32)


@pytest.mark.parametrize(("fn", "device"), homes("merge"))
def test_far_apart_parts(fn, device):
    """A part 200 nats below weighs nothing, and nothing overflows."""
    parts, lses = torch.randn(2, 1, 2, 64), torch.tensor([[[150.0, -150.0]], [[-50.0, 50.0]]])
    out, lse = run(fn, device, parts, lses, None, FP32)
    assert torch.equal(out.cpu(), torch.stack([parts[0, :, 0], parts[1, :, 1]], 1))
    assert torch.equal(lse.cpu(), torch.tensor([[150.0, 50.0]]))


@pytest.mark.parametrize(("fn", "device"), homes("merge"))
def test_strided(fn, device):
    """Parts are a slice of a larger buffer and out is a view of the layer's output."""
    parts, lses = torch.randn(4, 2, 3, 64), torch.randn(4, 2, 3)
    wide = torch.full((2, 3, 2, 64), torch.nan, device=device)
    fn(parts.to(device)[1:3], lses.to(device)[1:3], None, wide[:, :, 1], None)
    truth, _ = run(reference, "cpu", parts[1:3].double(), lses[1:3].double(), None, torch.float64)
    assert_close(wide[:, :, 1], truth, None, FP32)
    assert wide[:, :, 0].isnan().all()


def test_split_keys_equal_the_whole():
    """Attention over any two halves of the keys, merged, is attention over all of them."""
    q, k, v = torch.randn(2, 64).double(), torch.randn(9, 64).double(), torch.randn(9, 64).double()

    def attention(keys):
        logits = q @ k[keys].T
        return logits.softmax(-1) @ v[keys], logits.logsumexp(-1)

    halves = [attention(s) for s in (slice(0, 4), slice(4, 9))]
    parts, lses = (torch.stack(x)[:, None] for x in zip(*halves, strict=True))
    out, lse = run(reference, "cpu", parts, lses, None, torch.float64)
    whole = attention(slice(0, 9))
    assert_close(out[0], whole[0], None, torch.float64)
    assert_close(lse[0], whole[1], None, torch.float64)


@pytest.mark.parametrize(("fn", "device"), homes("merge"))
def test_nan_part_reaches_the_result(fn, device):
    parts, lses = torch.randn(3, 1, 2, 64), torch.randn(3, 1, 2)
    parts[1, 0, 0], lses[1, 0, 0] = torch.nan, torch.nan
    out, lse = run(fn, device, parts, lses, None, FP32)
    assert torch.isnan(out[0, 0]).all() and torch.isnan(lse[0, 0])
    assert torch.isfinite(out[0, 1]).all()
