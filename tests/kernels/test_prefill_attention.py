"""prefill_attention: every home against the fp64 reference, over segments, padding, windows, blocked keys."""

import pytest
import torch

from csrc_free_kernels.reference.prefill_attention import prefill_attention as reference
from tests.helpers.homes import homes, poison
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: Hkv, G, D, Q, (M, C'), query_start, key_start, key_len, dtype, soft_cap, window
CASES = {
    "one-query": (1, 1, 64, 1, (1, 1), [0], [0], [1], FP32, None, None),
    "chunk": (2, 3, 64, 37, (1, 37), [0], [0], [37], FP32, None, None),
    "left-padding": (1, 2, 80, 20, (1, 20), [-7, 0, -20], [-7, 0, -20], [20, 20, 20], FP32, None, None),
    "history": (1, 2, 64, 19, (5, 16), [70, 33], [0, 0], [70, 33], FP32, None, None),
    "history-later-segment": (1, 1, 64, 9, (2, 16), [60, 40], [32, 32], [28, 8], FP32, None, None),
    "no-keys": (1, 2, 64, 5, (2, 8), [16, 5], [16, 0], [0, 0], FP32, None, None),
    "keys-after-queries": (1, 1, 64, 8, (1, 40), [0], [4], [40], FP32, None, None),
    "tiles": (1, 1, 64, 70, (1, 150), [80], [0], [150], FP32, None, None),
    "window": (1, 2, 64, 40, (1, 130), [90], [0], [130], FP32, None, 33),
    "window-narrow": (1, 1, 64, 20, (1, 90), [60], [-3], [83], FP32, None, 3),
    "window-blocked": (1, 1, 96, 20, (6, 16), [90, 50], [0, 0], [90, 50], FP32, None, 40),
    "soft-cap": (1, 2, 64, 33, (1, 33), [0], [0], [33], FP32, 1.5, None),
    "bf16": (1, 2, 128, 140, (4, 64), [200, -5], [0, 0], [200, 256], BF16, None, None),
    "bf16-tiles": (1, 1, 128, 140, (1, 400), [260], [0], [400], BF16, None, 150),
    "bf16-wide-head": (1, 2, 256, 30, (1, 100), [70], [0], [100], BF16, None, None),
    "fp16": (1, 8, 64, 20, (2, 64), [128], [0], [128], FP16, 20.0, None),
}


def inputs(case):
    Hkv, G, D, Q, (M, C), query_start, key_start, key_len, dtype, *_ = CASES[case]
    B = len(query_start)
    q = torch.randn(B, Hkv * G, Q, D).to(dtype)
    k, v = torch.randn(2, B, Hkv, M * C, D).to(dtype)
    for b in range(B):  # keys that do not exist are NaN
        for x in (k, v):
            x[b, :, key_len[b] :] = torch.nan
            x[b, :, : max(0, -key_start[b])] = torch.nan
    k, v = (x.view(B, Hkv, M, C, D) for x in (k, v))
    return q, k, v, *(torch.tensor(x, dtype=torch.int32) for x in (query_start, key_start, key_len))


def result_so_far(q, share, dtype):
    """A random earlier result for a share of the queries; the others have none, and their out is 0."""
    out, lse = torch.randn(q.shape), torch.randn(q.shape[:-1])
    none = torch.rand(q.shape[:-1]) >= share
    out[none], lse[none] = 0, -torch.inf
    return out.to(dtype), lse.to(dtype)


def run(fn, device, args, so_far, **kw):
    args, (out, lse) = [a.to(device) for a in args], (x.to(device, copy=True) for x in so_far)
    fn(*args, out, lse, **kw)
    return out, lse


def double(args):
    return [a.double() if a.is_floating_point() else a for a in args]


BIASED = ["chunk", "left-padding", "history", "tiles", "window-blocked", "soft-cap", "bf16"]


@pytest.mark.parametrize("case", BIASED)
@pytest.mark.parametrize(("fn", "device"), homes("prefill_attention"))
def test_bias(fn, device, case):
    """A number per key is added to the logits; where keys do not exist it is NaN."""
    D, dtype, soft_cap, window = CASES[case][2], *CASES[case][-3:]
    args = inputs(case)
    bias = (2 * torch.randn(args[1].shape[:-1])).to(dtype).masked_fill(args[1][..., 0].isnan(), torch.nan)
    bias = torch.cat([bias, bias], -1)[..., : bias.shape[-1]]  # strided over blocks, as a trailer is
    kw = {"softmax_scale": D**-0.5, "soft_cap": soft_cap, "window": window, "bias_scale": 0.7}
    so_far = result_so_far(args[0], 0.7, FP32)
    truth = run(reference, "cpu", double(args), double(so_far), bias=bias.double(), **kw)
    plain = run(reference, "cpu", args, so_far, bias=bias, **kw)
    for got, exact, same in zip(
        run(fn, device, args, so_far, bias=bias.to(device), **kw), truth, plain, strict=True
    ):
        assert_close(got, exact, same, dtype)
    without = run(reference, "cpu", double(args), double(so_far), **(kw | {"bias_scale": 0.0}))
    assert not torch.allclose(truth[0], without[0], atol=1e-3), "the bias decides something"


@pytest.mark.parametrize("share", [0, 0.7], ids=["first", "folded"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("prefill_attention"))
def test_matches_reference(fn, device, case, share):
    D, dtype, soft_cap, window = CASES[case][2], *CASES[case][-3:]
    args = inputs(case)
    so_far = result_so_far(args[0], share, FP32)
    kw = {"softmax_scale": D**-0.5, "soft_cap": soft_cap, "window": window}
    truth = run(reference, "cpu", double(args), double(so_far), **kw)
    plain = run(reference, "cpu", args, so_far, **kw)
    for got, exact, same in zip(run(fn, device, args, so_far, **kw), truth, plain, strict=True):
        assert_close(got, exact, same, dtype)


@pytest.mark.parametrize(("fn", "device"), homes("prefill_attention"))
def test_segments_add_up(fn, device):
    """History in blocks, then the chunk itself, equals causal attention over the whole sequence."""
    hist, Q, D = 40, 24, 64
    q = torch.randn(1, 2, Q, D)
    k, v = torch.randn(2, 1, 1, hist + Q, D)
    starts = [torch.tensor([x], dtype=torch.int32, device=device) for x in (hist, 0, hist, Q)]
    kw = {"softmax_scale": D**-0.5, "soft_cap": None, "window": None}

    blocks = poison(2, 1, 1, 3, 16, D, dtype=FP32, device=device)
    blocks.view(2, 1, 1, 48, D)[..., :hist, :] = torch.stack([k, v])[..., :hist, :].to(device)
    out, lse = torch.zeros(q.shape, device=device), torch.full(q.shape[:-1], -torch.inf, device=device)
    fn(q.to(device), *blocks, starts[0], starts[1], starts[0], out, lse, **kw)
    own = [x[:, :, None, hist:].to(device) for x in (k, v)]
    fn(q.to(device), *own, starts[0], starts[2], starts[3], out, lse, **kw)

    logits = q.double() @ k.double().transpose(-1, -2) * D**-0.5
    logits = logits.masked_fill(torch.ones(Q, hist + Q).triu(hist + 1).bool(), -torch.inf)
    assert_close(out, logits.softmax(-1) @ v.double(), None, FP32)
    assert_close(lse, logits.logsumexp(-1), None, FP32)


@pytest.mark.parametrize(("fn", "device"), homes("prefill_attention"))
def test_strided(fn, device):
    """Keys are views of staged [K | V] blocks, q and out are head-transposed views as a model has them."""
    q, k, v, *starts = inputs("history")
    kw = {"softmax_scale": 0.125, "soft_cap": None, "window": None}
    so_far = result_so_far(q, 0.5, FP32)
    truth = run(reference, "cpu", double([q, k, v, *starts]), double(so_far), **kw)
    staging = torch.cat([k.flatten(3), v.flatten(3), torch.full((2, 1, 5, 16), torch.nan)], -1).to(device)
    k, v = (staging[..., i * 1024 : (i + 1) * 1024].view(2, 1, 5, 16, 64) for i in (0, 1))
    q = q.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = (x.to(device).transpose(1, 2).contiguous().transpose(1, 2) for x in so_far)
    fn(q, k, v, *(s.to(device) for s in starts), out, lse, **kw)
    assert_close(out, truth[0], None, FP32)
    assert_close(lse, truth[1], None, FP32)


@pytest.mark.parametrize(("fn", "device"), homes("prefill_attention"))
def test_unseen_results_stay(fn, device):
    """Queries that see no key of the segment keep their result bit for bit."""
    args = inputs("no-keys")
    so_far = result_so_far(args[0], 1.0, FP32)
    out, lse = run(fn, device, args, so_far, softmax_scale=0.125, soft_cap=None, window=None)
    assert torch.equal(out.cpu(), so_far[0]) and torch.equal(lse.cpu(), so_far[1])
