"""score_minmax: every home against the fp64 reference, and the reference against its definition."""

import pytest
import torch

from csrc_free_kernels.reference.score_minmax import score_minmax as reference
from tests.helpers.homes import homes
from tests.helpers.scores import check_score, run_score, score_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: B, Hkv, G, D, C, N, seq_lens, dtype
CASES = {
    "one-token": (1, 1, 1, 64, 8, 4, [1], FP32),
    "one-block": (1, 2, 4, 64, 8, 4, [8], FP32),
    "block-and-token": (1, 1, 3, 80, 8, 4, [9], FP32),
    "ragged-inactive": (4, 2, 7, 96, 8, 6, [47, 0, 48, 5], FP32),
    "many-tiles": (2, 1, 2, 64, 8, 150, [1200, 500], FP32),
    "wide-group": (1, 1, 20, 64, 8, 5, [33], FP32),
    "bf16": (2, 2, 8, 128, 64, 5, [300, 129], BF16),
    "bf16-wide-head": (1, 1, 4, 256, 8, 6, [41], BF16),
    "fp16": (1, 2, 3, 128, 16, 4, [50], FP16),
}


# the same for summaries of several sub-units: W, then as above
PAGED = {
    "two-units": (4, 2, 2, 3, 80, 8, 5, [39, 8], FP32),
    "four-units-many": (8, 2, 1, 5, 64, 16, 70, [1100, 16], FP32),
    "four-units-bf16": (8, 1, 2, 8, 128, 64, 4, [200], BF16),
}


@pytest.mark.parametrize("group_by", ["max", "mean"])
@pytest.mark.parametrize("case", PAGED)
@pytest.mark.parametrize(("fn", "device"), homes("score_minmax"))
def test_sub_units(fn, device, case, group_by):
    W, B, Hkv, G, D, C, N, seq_lens, dtype = PAGED[case]
    inputs = score_inputs(B, Hkv, G, D, C, N, W, seq_lens, dtype, minmax=True)
    check_score(fn, device, reference, inputs, block_size=C, softmax_scale=D**-0.5, group_by=group_by)


@pytest.mark.parametrize("case", ["one-token", "ragged-inactive", "wide-group", "bf16"])
@pytest.mark.parametrize(("fn", "device"), homes("score_minmax"))
def test_mean_of_the_group(fn, device, case):
    B, Hkv, G, D, C, N, seq_lens, dtype = CASES[case]
    inputs = score_inputs(B, Hkv, G, D, C, N, 2, seq_lens, dtype, minmax=True)
    check_score(fn, device, reference, inputs, block_size=C, softmax_scale=D**-0.5, group_by="mean")


@pytest.mark.parametrize(("fn", "device"), homes("score_minmax"))
def test_one_vector_for_both(fn, device):
    """Maxima and minima may be the same memory: the bound of a block whose keys are all equal is its logit."""
    inputs = score_inputs(2, 2, 3, 80, 8, 6, 1, [47, 9], FP32)
    inputs["summary"] = inputs["summary"].expand(-1, -1, 2, -1)
    truth = check_score(fn, device, reference, inputs, block_size=8, softmax_scale=0.3)
    key = inputs["summary"][inputs["host_table"][0, 2], 1, 0].double()
    logits = 0.3 * inputs["q"][0, 3:].double() @ key
    assert float(truth[0, 1, 2]) == pytest.approx(float(logits.max()), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("score_minmax"))
def test_matches_reference(fn, device, case):
    B, Hkv, G, D, C, N, seq_lens, dtype = CASES[case]
    inputs = score_inputs(B, Hkv, G, D, C, N, 2, seq_lens, dtype, minmax=True)
    check_score(fn, device, reference, inputs, block_size=C, softmax_scale=D**-0.5)


@pytest.mark.parametrize(("fn", "device"), homes("score_minmax"))
def test_negative_bounds(fn, device):
    """No padded query head or channel, whose bound would be 0, takes part in the maximum."""
    inputs = score_inputs(1, 1, 3, 80, 8, 3, 2, [24], FP32, minmax=True)
    inputs["q"] = inputs["q"].abs()
    inputs["summary"] = inputs["summary"] - 5
    assert (check_score(fn, device, reference, inputs, block_size=8, softmax_scale=0.1) < 0).all()


@pytest.mark.parametrize(("fn", "device"), homes("score_minmax"))
def test_refuses_other_summaries(fn, device):
    inputs = score_inputs(1, 1, 2, 64, 8, 2, 1, [16], FP32)
    with pytest.raises(ValueError, match="maxima and minima"):
        run_score(fn, device, inputs, block_size=8, softmax_scale=1.0)
    inputs["summary"] = inputs["summary"].expand(-1, -1, 3, -1)
    with pytest.raises(ValueError, match="maxima and minima, not 3"):
        run_score(fn, device, inputs, block_size=8, softmax_scale=1.0)
    inputs = score_inputs(1, 1, 2, 64, 8, 2, 2, [16], FP32, minmax=True)
    with pytest.raises(ValueError, match="group_by must be max or mean, not 'sum'"):
        run_score(fn, device, inputs, block_size=8, softmax_scale=1.0, group_by="sum")


@pytest.mark.parametrize("group_by", ["max", "mean"])
@pytest.mark.parametrize("W", [2, 4])
def test_reference_is_the_definition(W, group_by):
    """Sub-unit by sub-unit: a bound for each query head, the group reduced, then the best sub-unit."""
    inputs = score_inputs(2, 2, 3, 16, 4, 5, W, [19, 8], torch.float64, minmax=True)
    scores = run_score(reference, "cpu", inputs, block_size=4, softmax_scale=0.5, group_by=group_by)
    for b, closed in enumerate([4, 2]):
        for h in range(2):
            for n in range(closed):
                best = -torch.inf
                for high, low in inputs["summary"][inputs["host_table"][b, n], h].unflatten(0, (-1, 2)):
                    heads = inputs["q"][b, 3 * h : 3 * h + 3]
                    bounds = [float(torch.maximum(q * high, q * low).sum()) for q in heads]
                    best = max(best, max(bounds) if group_by == "max" else sum(bounds) / 3)
                assert float(scores[b, h, n]) == pytest.approx(0.5 * best, rel=1e-12)
            assert torch.equal(
                scores[b, h, closed:], torch.full((5 - closed,), -torch.inf, dtype=torch.float64)
            )
