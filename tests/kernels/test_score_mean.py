"""score_mean: every home against the fp64 reference, and the reference against its definition."""

import math

import pytest
import torch

from csrc_free_kernels.reference.score_mean import score_mean as reference
from tests.helpers.homes import homes
from tests.helpers.scores import check_score, run_score, score_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: B, Hkv, G, D, C, N, seq_lens, dtype
CASES = {
    "one-token": (1, 1, 1, 64, 8, 4, [1], FP32),
    "one-block": (1, 2, 4, 64, 8, 4, [8], FP32),
    "block-and-token": (1, 1, 3, 80, 8, 4, [9], FP32),
    "ragged-inactive": (4, 2, 7, 96, 8, 6, [47, 0, 48, 5], FP32),
    "one-block-capacity": (1, 1, 2, 64, 8, 1, [8], FP32),
    "many-tiles": (2, 1, 2, 64, 8, 150, [1200, 700], FP32),
    "wide-group": (1, 1, 20, 64, 8, 5, [33], FP32),
    "bf16": (2, 2, 8, 128, 64, 5, [300, 129], BF16),
    "bf16-wide-head": (1, 1, 4, 256, 8, 6, [41], BF16),
    "fp16": (1, 2, 3, 128, 16, 4, [50], FP16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("score_mean"))
def test_matches_reference(fn, device, case):
    B, Hkv, G, D, C, N, seq_lens, dtype = CASES[case]
    inputs = score_inputs(B, Hkv, G, D, C, N, 1, seq_lens, dtype)
    truth = check_score(fn, device, reference, inputs, block_size=C, softmax_scale=D**-0.5)
    for b, seq_len in enumerate(seq_lens):
        assert torch.isfinite(truth[b]).sum(-1).eq(seq_len // C).all()
        assert seq_len < C or torch.allclose(
            truth[b, :, : seq_len // C].sum(-1), torch.ones((), dtype=torch.float64)
        )


@pytest.mark.parametrize(("fn", "device"), homes("score_mean"))
def test_large_logits(fn, device):
    """Logits in the hundreds neither overflow nor turn into NaN (bf16: in fp32 1e-6 is out of reach here)."""
    inputs = score_inputs(1, 1, 2, 64, 8, 5, 1, [40], BF16)
    check_score(fn, device, reference, inputs, block_size=8, softmax_scale=20.0)


@pytest.mark.parametrize(("fn", "device"), homes("score_mean"))
def test_refuses_several_means(fn, device):
    inputs = score_inputs(1, 1, 2, 64, 8, 2, 2, [16], FP32)
    with pytest.raises(ValueError, match="one mean a block"):
        run_score(fn, device, inputs, block_size=8, softmax_scale=1.0)


def test_reference_is_the_definition():
    inputs = score_inputs(2, 2, 3, 16, 4, 5, 1, [19, 8], torch.float64)
    scores = run_score(reference, "cpu", inputs, block_size=4, softmax_scale=0.5)
    for b, closed in enumerate([4, 2]):
        for h in range(2):
            weights = [[0.0] * closed for _ in range(3)]
            for g in range(3):
                for n in range(closed):
                    key = inputs["summary"][inputs["host_table"][b, n], h, 0]
                    weights[g][n] = math.exp(0.5 * float(inputs["q"][b, 3 * h + g] @ key))
            for n in range(closed):
                expected = sum(w[n] / sum(w) for w in weights) / 3
                assert float(scores[b, h, n]) == pytest.approx(expected, rel=1e-12)
            assert torch.equal(
                scores[b, h, closed:], torch.full((5 - closed,), -torch.inf, dtype=torch.float64)
            )
