"""attend: every home against the fp64 reference, over dirty pools and ragged rows."""

import pytest
import torch

from csrc_free_kernels.reference.attend import attend as reference
from tests.helpers.homes import homes, poison
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: B, Hkv, G, D, C, S, T, seq_lens, dtype, soft_cap, window
CASES = {
    "one-token": (1, 1, 1, 64, 16, 2, 1, [1], FP32, None, None),
    "one-block": (1, 2, 4, 64, 16, 2, 1, [16], FP32, None, None),
    "block-and-token": (1, 1, 3, 80, 16, 3, 1, [17], FP32, None, None),
    "ragged-splits": (3, 2, 4, 64, 16, 5, 2, [70, 0, 33], FP32, None, None),
    "more-splits-than-blocks": (1, 1, 2, 64, 16, 2, 3, [30], FP32, None, None),
    "small-blocks": (2, 1, 7, 96, 8, 7, 3, [50, 9], FP32, None, None),
    "wide-group": (1, 1, 20, 64, 16, 3, 1, [41], FP32, None, None),
    "soft-cap": (1, 2, 2, 64, 16, 4, 2, [60], FP32, 1.5, None),
    "soft-cap-large": (1, 1, 2, 64, 16, 4, 1, [60], FP32, 50.0, None),
    "window": (2, 1, 2, 64, 16, 5, 2, [75, 20], FP32, None, 21),
    "bf16": (2, 1, 8, 128, 64, 3, 2, [190, 65], BF16, None, None),
    "bf16-wide-head": (1, 1, 4, 256, 16, 4, 2, [63], BF16, None, 40),
    "fp16": (1, 2, 3, 64, 16, 4, 1, [50], FP16, 5.0, None),
}


def inputs(B, Hkv, G, D, C, S, seq_lens, dtype, *, absent=0.25):
    """Random selections over a pool that is NaN wherever no selected, existing token lives."""
    q = torch.randn(B, Hkv * G, D).to(dtype)
    k, v = (torch.full((B * Hkv * S + 3, C, D), float("nan"), dtype=dtype) for _ in range(2))
    ids, slots = (torch.full((B, Hkv, S), -1, dtype=torch.int32) for _ in range(2))
    free = iter((torch.randperm(B * Hkv * S) + 3).tolist())
    for b, seq_len in enumerate(seq_lens):
        blocks = -(-seq_len // C)
        for h in range(Hkv):
            tail = [blocks - 1] if blocks else []
            chosen = sorted(tail + torch.randperm(max(blocks - 1, 0))[: S - 1].tolist())
            for s, n in enumerate(chosen):
                ids[b, h, s] = n
                if len(chosen) > 1 and torch.rand(()) < absent:
                    continue
                slots[b, h, s] = slot = next(free)
                there = min(C, seq_len - n * C)
                k[slot, :there], v[slot, :there] = torch.randn(2, there, D).to(dtype)
    return q, k, v, ids, slots, torch.tensor(seq_lens, dtype=torch.int32)


def run(fn, device, args, num_splits, **kw):
    args = [a.to(device) for a in args]
    wide = torch.float64 if args[0].dtype == torch.float64 else FP32
    out = poison(num_splits, *args[0].shape, dtype=wide, device=device)
    lse = poison(num_splits, *args[0].shape[:2], dtype=wide, device=device)
    fn(*args, out, lse, **kw)
    return out, lse


def check(fn, device, args, num_splits, dtype, **kw):
    truth = run(
        reference, "cpu", [a.double() if a.is_floating_point() else a for a in args], num_splits, **kw
    )
    plain = run(reference, "cpu", args, num_splits, **kw)
    for got, exact, same in zip(run(fn, device, args, num_splits, **kw), truth, plain, strict=True):
        assert_close(got, exact, same, dtype)
    return truth


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("attend"))
def test_matches_reference(fn, device, case):
    B, Hkv, G, D, C, S, T, seq_lens, dtype, soft_cap, window = CASES[case]
    args = inputs(B, Hkv, G, D, C, S, seq_lens, dtype)
    check(fn, device, args, T, dtype, softmax_scale=D**-0.5, soft_cap=soft_cap, window=window)


BIASED = ["block-and-token", "ragged-splits", "small-blocks", "soft-cap", "window", "bf16", "fp16"]


def bias_of(k, dtype):
    """A bias [L, C] of every token there is, NaN elsewhere; strided over slots, as a trailer is."""
    bias = (2 * torch.randn(k.shape[:2])).to(dtype).masked_fill(k[..., 0].isnan(), torch.nan)
    return torch.cat([bias, bias], 1)[:, : k.shape[1]]


@pytest.mark.parametrize("case", BIASED)
@pytest.mark.parametrize(("fn", "device"), homes("attend"))
def test_bias(fn, device, case):
    """A number per token is added to the logits."""
    B, Hkv, G, D, C, S, T, seq_lens, dtype, soft_cap, window = CASES[case]
    args = inputs(B, Hkv, G, D, C, S, seq_lens, dtype)
    bias = bias_of(args[1], dtype)
    kw = {"softmax_scale": D**-0.5, "soft_cap": soft_cap, "window": window, "bias_scale": 0.7}
    wide = [a.double() if a.is_floating_point() else a for a in args]
    truth = run(reference, "cpu", wide, T, bias_pool=bias.double(), **kw)
    plain = run(reference, "cpu", args, T, bias_pool=bias, **kw)
    for got, exact, same in zip(
        run(fn, device, args, T, bias_pool=bias.to(device), **kw), truth, plain, strict=True
    ):
        assert_close(got, exact, same, dtype)


def test_bias_is_one_more_channel():
    """The bias of a token acts as a key channel that every query sees as `bias_scale / softmax_scale`."""
    q, k, v, ids, slots, lens = inputs(1, 2, 3, 64, 16, 3, [41], torch.float64)
    bias, scale = bias_of(k, torch.float64), 0.2
    kw = {"softmax_scale": scale, "soft_cap": None, "window": None}
    got = run(reference, "cpu", [q, k, v, ids, slots, lens], 1, bias_pool=bias, bias_scale=0.5, **kw)
    longer_q = torch.cat([q, torch.full_like(q[..., :1], 0.5 / scale)], -1)
    longer_k, longer_v = torch.cat([k, bias[..., None]], -1), torch.cat([v, bias[..., None]], -1)
    out, lse = run(reference, "cpu", [longer_q, longer_k, longer_v, ids, slots, lens], 1, **kw)
    assert_close(got[0], out[..., :-1], None, torch.float64)
    assert_close(got[1], lse, None, torch.float64)


@pytest.mark.parametrize(("fn", "device"), homes("attend"))
def test_nothing_present(fn, device):
    """Blocks are selected but none has a slot: zeros and -inf in every split."""
    args = list(inputs(2, 1, 2, 64, 16, 3, [40, 9], FP32))
    args[4] = torch.full_like(args[4], -1)
    out, lse = run(fn, device, args, 2, softmax_scale=0.125, soft_cap=None, window=None)
    assert torch.equal(out.cpu(), torch.zeros_like(out.cpu()))
    assert torch.equal(lse.cpu(), torch.full_like(lse.cpu(), -torch.inf))


@pytest.mark.parametrize(("fn", "device"), homes("attend"))
def test_strided_pool_and_outputs(fn, device):
    """K and V are halves of a block with a trailer; out is a slice of a larger set of parts; q is a view."""
    q, k, v, ids, slots, seq_lens = inputs(2, 2, 2, 64, 16, 3, [40, 20], FP32)
    kw = {"softmax_scale": 0.125, "soft_cap": None, "window": None}
    truth = run(reference, "cpu", [q.double(), k.double(), v.double(), ids, slots, seq_lens], 2, **kw)
    pool = torch.full((k.shape[0], 2 * 16 * 64 + 16), float("nan"), device=device)
    pool[:, : 16 * 64], pool[:, 16 * 64 : -16] = k.flatten(1).to(device), v.flatten(1).to(device)
    k, v = pool[:, : 16 * 64].view(-1, 16, 64), pool[:, 16 * 64 : -16].view(-1, 16, 64)
    q = torch.stack([q, q], 2).to(device)[:, :, 1]
    parts, lses = poison(4, 2, 4, 64, dtype=FP32, device=device), poison(4, 2, 4, dtype=FP32, device=device)
    fn(q, k, v, ids.to(device), slots.to(device), seq_lens.to(device), parts[1:3], lses[1:3], **kw)
    assert_close(parts[1:3], truth[0], None, FP32)
    assert_close(lses[1:3], truth[1], None, FP32)
    assert parts[[0, 3]].isnan().all() and lses[[0, 3]].isnan().all()


@pytest.mark.parametrize(("fn", "device"), homes("attend"))
def test_large_logits_stay_finite(fn, device):
    args = list(inputs(1, 1, 2, 64, 16, 3, [45], FP32, absent=0))
    args[0] = args[0] * 100
    check(fn, device, args, 1, FP32, softmax_scale=1.0, soft_cap=None, window=None)


@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.parametrize(("fn", "device"), homes("attend"))
def test_nan_among_the_keys_reaches_the_result(fn, device, what):
    """A model that went wrong must be seen to be wrong: NaN is not an absent block."""
    q, k, v, ids, slots, lens = inputs(1, 1, 2, 64, 16, 3, [45], FP32, absent=0)
    (k if what == "key" else v)[slots[0, 0, 1].long()] = torch.nan
    out, lse = run(fn, device, (q, k, v, ids, slots, lens), 1, softmax_scale=1.0, soft_cap=None, window=None)
    assert torch.isnan(out).all()
    assert torch.isnan(lse).all() == (what == "key")
