"""score_windows: every home against the fp64 reference, and the reference against its definition."""

import math

import pytest
import torch

from csrc_free_kernels.reference.score_windows import score_windows as reference
from tests.helpers.homes import homes
from tests.helpers.scores import check_score, run_score, score_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: B, Hkv, G, D, C, N, W, seq_lens, dtype
CASES = {
    "no-window": (2, 1, 1, 64, 8, 3, 4, [3, 0], FP32),  # one sub-unit, no sub-unit
    "first-window": (2, 1, 4, 64, 8, 3, 4, [4, 5], FP32),
    "one-block": (1, 2, 3, 64, 8, 3, 4, [8], FP32),
    "window-over-the-edge": (2, 1, 2, 80, 8, 4, 4, [10, 9], FP32),  # window 3 spans blocks 0 and 1
    "ragged-inactive": (4, 2, 7, 96, 8, 6, 4, [47, 0, 48, 13], FP32),
    "two-units": (1, 2, 4, 64, 8, 5, 2, [39], FP32),
    "one-unit": (1, 1, 4, 64, 8, 5, 1, [39], FP32),
    "three-units": (1, 1, 2, 64, 12, 5, 3, [59], FP32),
    "many-tiles": (2, 1, 2, 64, 8, 80, 4, [640, 300], FP32),
    "bf16": (2, 1, 8, 128, 64, 5, 4, [300, 129], BF16),
    "bf16-wide-head": (1, 1, 4, 256, 16, 4, 4, [63], BF16),
    "fp16": (1, 2, 3, 128, 16, 4, 4, [50], FP16),
}


@pytest.mark.parametrize("pool", ["max", "overlap"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("score_windows"))
def test_matches_reference(fn, device, case, pool):
    B, Hkv, G, D, C, N, W, seq_lens, dtype = CASES[case]
    inputs = score_inputs(B, Hkv, G, D, C, N, W, seq_lens, dtype)
    check_score(fn, device, reference, inputs, block_size=C, softmax_scale=D**-0.5, pool=pool)


@pytest.mark.parametrize(("fn", "device"), homes("score_windows"))
def test_large_logits(fn, device):
    """Logits in the hundreds neither overflow nor turn into NaN (bf16: in fp32 1e-6 is out of reach here)."""
    inputs = score_inputs(1, 1, 2, 64, 8, 5, 4, [40], BF16)
    check_score(fn, device, reference, inputs, block_size=8, softmax_scale=20.0)


@pytest.mark.parametrize("pool", ["max", "overlap"])
def test_reference_is_the_definition(pool):
    C, W, unit = 8, 4, 2
    inputs = score_inputs(2, 1, 3, 16, C, 4, W, [29, 11], torch.float64)
    scores = run_score(reference, "cpu", inputs, block_size=C, softmax_scale=0.5, pool=pool)
    for b, seq_len in enumerate([29, 11]):
        means = [inputs["summary"][inputs["host_table"][b, u // W], 0, u % W] for u in range(seq_len // unit)]
        windows = [(means[j] + means[j + 1]) / 2 for j in range(4 * W) if (j + 2) * unit <= seq_len]
        exps = [[math.exp(0.5 * float(inputs["q"][b, g] @ w)) for w in windows] for g in range(3)]
        weights = [sum(e[j] / sum(e) for e in exps) for j in range(len(windows))]
        for n in range(4):
            own = [j for j in range(W * n - 1, W * n + W) if 0 <= j < len(windows)]
            best = max((weights[j] for j in own), default=-math.inf)
            if pool == "overlap" and own:  # tokens that window and block share, in sub-units
                tokens = [{*range(j * unit, (j + 2) * unit)} & {*range(n * C, (n + 1) * C)} for j in own]
                best = sum(weights[j] * len(shared) / unit for j, shared in zip(own, tokens, strict=True))
            assert float(scores[b, 0, n]) == pytest.approx(best, rel=1e-12)
