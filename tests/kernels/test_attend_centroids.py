"""attend_centroids: every home against the fp64 reference, and the reference against attention over repeated means."""

import pytest
import torch

from csrc_free_kernels.reference.attend_centroids import attend_centroids as reference
from tests.helpers.homes import homes, poison
from tests.helpers.scores import score_inputs
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: B, Hkv, G, D, C, N, W, S, T, seq_lens, dtype, soft_cap
CASES = {
    "nothing-closed": (1, 1, 1, 64, 8, 4, 1, 2, 1, [7], FP32, None),
    "one-block": (1, 2, 4, 64, 8, 4, 1, 1, 1, [9], FP32, None),
    "ragged-inactive": (4, 2, 7, 80, 8, 9, 1, 3, 2, [71, 0, 72, 5], FP32, None),
    "more-splits-than-blocks": (1, 1, 2, 64, 8, 4, 1, 1, 3, [17], FP32, None),
    "sub-units": (2, 1, 3, 96, 16, 6, 4, 2, 2, [96, 50], FP32, None),
    "many-tiles": (1, 1, 2, 64, 8, 150, 1, 40, 2, [1200], FP32, None),
    "wide-group-cap": (1, 1, 20, 64, 8, 6, 1, 2, 1, [48], FP32, 1.5),
    "bf16": (2, 2, 8, 128, 64, 5, 1, 2, 2, [300, 129], BF16, None),
    "bf16-wide-head": (1, 1, 4, 256, 8, 6, 1, 2, 1, [41], BF16, 50.0),
    "fp16": (1, 2, 3, 128, 16, 4, 2, 1, 1, [50], FP16, None),
}


def build(case):
    """Random means of closed blocks on scattered pages, everything else NaN, and a random selection with the tail."""
    B, Hkv, G, D, C, N, W, S, T, seq_lens, dtype, cap = CASES[case]
    x = score_inputs(B, Hkv, G, D, C, N, W, seq_lens, dtype)
    mean_v = torch.where(x["summary"].isnan(), torch.nan, torch.randn(x["summary"].shape)).to(dtype)
    selected = torch.full((B, Hkv, S), -1, dtype=torch.int32)
    for b, seq_len in enumerate(seq_lens):
        blocks = -(-seq_len // C)
        for h in range(Hkv if blocks else 0):
            chosen = sorted([blocks - 1, *torch.randperm(blocks - 1)[: S - 1].tolist()])
            selected[b, h, : len(chosen)] = torch.tensor(chosen)
    args = (x["q"], x["summary"], mean_v, x["host_table"], x["seq_lens"], selected)
    return args, T, {"softmax_scale": D**-0.5, "soft_cap": cap, "block_size": C}


def run(fn, device, args, splits, **kw):
    args = [a.to(device) for a in args]
    wide = torch.float64 if args[0].dtype == torch.float64 else FP32
    out = poison(splits, *args[0].shape, dtype=wide, device=device)
    lse = poison(splits, *args[0].shape[:2], dtype=wide, device=device)
    fn(*args, out, lse, **kw)
    return out, lse


def double(args):
    return [a.double() if a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("attend_centroids"))
def test_matches_reference(fn, device, case):
    args, splits, kw = build(case)
    truth, plain = (
        run(reference, "cpu", double(args), splits, **kw),
        run(reference, "cpu", args, splits, **kw),
    )
    for got, exact, same in zip(run(fn, device, args, splits, **kw), truth, plain, strict=True):
        assert_close(got, exact, same, args[0].dtype)


@pytest.mark.parametrize(("fn", "device"), homes("attend_centroids"))
def test_everything_selected_leaves_nothing(fn, device):
    args, _, kw = build("one-block")
    selected = torch.arange(2, dtype=torch.int32).expand(1, 2, 2).contiguous()
    out, lse = run(fn, device, (*args[:-1], selected), 2, **kw)
    assert not out.any() and torch.equal(lse.cpu(), torch.full((2, 1, 8), -torch.inf))


@pytest.mark.parametrize(("fn", "device"), homes("attend_centroids"))
def test_large_logits_stay_finite(fn, device):
    args, splits, kw = build("bf16")
    args, kw = [100 * args[0], *args[1:]], kw | {"softmax_scale": 1.0}
    truth, plain = (
        run(reference, "cpu", double(args), splits, **kw),
        run(reference, "cpu", args, splits, **kw),
    )
    for got, exact, same in zip(run(fn, device, args, splits, **kw), truth, plain, strict=True):
        assert_close(got, exact, same, BF16)


@pytest.mark.parametrize("case", ["ragged-inactive", "sub-units", "wide-group-cap"])
def test_reference_is_attention_over_repeated_means(case):
    """Every token of a left-out sub-unit replaced by the mean, then ordinary attention."""
    (q, mean_k, mean_v, table, lens, selected), _, kw = build(case)
    q, mean_k, mean_v = q.double(), mean_k.double(), mean_v.double()
    out, lse = run(reference, "cpu", (q, mean_k, mean_v, table, lens, selected), 1, **kw)
    size, units = kw["block_size"], mean_k.shape[2]
    for b in range(len(q)):
        for h in range(q.shape[1]):
            kv = h * selected.shape[1] // q.shape[1]
            left = [n for n in range(int(lens[b]) // size) if n not in selected[b, kv].tolist()]
            keys, values = (
                torch.cat(
                    [mean[table[b, n], kv].repeat_interleave(size // units, 0) for n in left] or [q[:0, 0]]
                )
                for mean in (mean_k, mean_v)
            )
            x = kw["softmax_scale"] * keys @ q[b, h]
            x = x if kw["soft_cap"] is None else kw["soft_cap"] * torch.tanh(x / kw["soft_cap"])
            torch.testing.assert_close(lse[0, b, h], torch.logsumexp(x, 0))
            torch.testing.assert_close(out[0, b, h], torch.softmax(x, 0) @ values)
