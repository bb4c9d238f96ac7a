"""The fits learn: held-out loss falls, the rankings beat chance on a tiny model; what is saved is what was fitted."""

import pytest
import torch

from rheo_offload.calibration.capture import Sample
from rheo_offload.calibration.data import Windows
from rheo_offload.calibration.fit import FitOptions, GateHead, fit, pool_windows
from rheo_offload.calibration.run import CalibrationOptions, calibrate, save
from rheo_offload.calibration.score import WARM_QUERIES, Budget, mean_key_scores, replay
from rheo_offload.errors import CalibrationError, HeadsError
from rheo_offload.model.gates import load_gates
from rheo_offload.model.learned_heads import BIAS_TENSORS, bias_heads, read_heads
from rheo_offload.model.specs import layer_specs
from rheo_offload.ops import kernels_for
from rheo_offload.selection.rope import Rope
from tests.helpers.tiny_model import tiny_model

C, TOKENS = 32, 512
OPTIONS = CalibrationOptions(
    block_size=C, token_budget=5 * C, queries=96, score_steps=60, fit=FitOptions(steps=120, every=10)
)


def window(seed):
    """Half of it blocks of equal tokens, so that blocks differ in what attends to them; then all kinds of queries."""
    generator = torch.Generator().manual_seed(seed)
    runs, single = (torch.randint(3, 27, (n,), generator=generator) for n in (TOKENS // C // 2, TOKENS // 2))
    return torch.cat((runs.repeat_interleave(C), single))


@pytest.fixture(scope="module")
def calibrated():
    model = tiny_model("llama")
    windows = Windows([window(i) for i in range(5)], window(10), window(11))
    return model, calibrate(model, windows, OPTIONS)


def recall(sample, agnostic, share, scores=None):
    budget = Budget(blocks=5, sink=1, recent=1, share=share)
    return replay(sample, budget, mean_key_scores(sample) if scores is None else scores, agnostic).recall


@torch.no_grad()
def chance(sample, share):
    """Mean recall of random rankings."""
    found = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        ranking = torch.rand(sample.mass.shape[1:], generator=generator)
        found.append(recall(sample, ranking, share, torch.rand(sample.mass.shape, generator=generator)))
    return sum(found) / len(found)


def test_the_eviction_head_learns(calibrated):
    """On a window that neither the fit nor its end has seen, all layers together."""
    _, found = calibrated
    gained = []
    for i, fitted in found.eviction.items():
        assert fitted.after < fitted.before - 0.02
        sample = found.samples[i]
        with torch.no_grad():
            gained.append(recall(sample, fitted.head.importance(sample), 1.0) - chance(sample, 1.0))
    assert sum(gained) / len(gained) > 0.01


def test_the_gate_learns(calibrated):
    _, found = calibrated
    for i, fitted in found.gate.items():
        assert fitted.after < fitted.before - 0.02
        sample = found.samples[i]
        with torch.no_grad():
            scores = fitted.head.logits(sample, torch.arange(len(sample.positions))).softmax(-1)
        assert recall(sample, None, 0.0, scores) > chance(sample, 0.0) + 0.05


def test_the_score_has_a_row_for_each_ranking(calibrated):
    _, found = calibrated
    rows = {(query, agnostic): score for query, agnostic, _, score in found.scores(OPTIONS)}
    assert set(rows) == {("oracle", "none")} | {
        (query, agnostic) for query in ("mean_key", "gate") for agnostic in ("none", "heat", "eviction head")
    }
    assert rows["oracle", "none"].recall == max(s.recall for s in rows.values())
    assert all(0 < s.recall <= 1 and 0 < s.hit_rate <= 1 for s in rows.values())
    assert rows["mean_key", "heat"].hit_rate > rows["mean_key", "none"].hit_rate


def test_what_is_saved_is_what_was_fitted(calibrated, tmp_path):
    """The side file through its readers: the same importance, and the gate's scores as a decode step has them."""
    model, found = calibrated
    path = str(tmp_path / "side.safetensors")
    save(path, model, found, OPTIONS, "runs of tokens")
    file = read_heads(path)
    assert file.info.method == "nosa, seer_r" and "runs of tokens" in file.info.provenance
    assert "'block_size': 32" in file.info.provenance and "'seed': 0" in file.info.provenance
    heads = bias_heads(read_heads(path, BIAS_TENSORS), layer_specs(model.config), model_type="llama")
    gates = load_gates(path, model, layer_specs(model.config), block_size=C)
    with pytest.raises(
        HeadsError, match=f"fitted to blocks of {C} tokens; set cache.block_size={C}, not {2 * C}"
    ):
        load_gates(path, model, layer_specs(model.config), block_size=2 * C)
    ops = kernels_for(torch.device("cpu"), "reference")
    for i, sample in found.samples.items():
        with torch.no_grad():
            tokens = heads[i](sample.values.view(1, -1, 2, 16).transpose(1, 2))[0]
            torch.testing.assert_close(
                pool_windows(tokens, C), found.eviction[i].head.importance(sample), atol=1e-5, rtol=1e-5
            )
        # the gate as a decode step at the last query has it
        at = int(sample.positions[-1])
        blocks = torch.arange(len(sample.pooled))
        summary = gates[i].key_of(sample.pooled, blocks[:, None] * C)[:, :, None].detach()
        scores = torch.full((1, 2, len(blocks)), torch.nan)
        gates[i].score(
            ops, sample.q[:, :, -1].flatten(0, 1)[None], summary, blocks[None].int(),
            torch.tensor([at + 1]), None, None, scores, softmax_scale=9.0, block_size=C,
        )  # fmt: skip
        with torch.no_grad():
            logits = found.gate[i].head.logits(sample, torch.tensor([len(sample.positions) - 1]))
        torch.testing.assert_close(scores[0], logits.softmax(-1)[0], atol=1e-5, rtol=1e-4)


class Misled:
    """A head whose own text pulls it away from what the text held out wants."""

    lr = 0.1

    def __init__(self):
        self.x = torch.zeros(1, requires_grad=True)

    def parameters(self):
        return [self.x]

    def loss(self, sample, queries):
        return (self.x - sample.softmax_scale).square().sum()


def test_a_fit_that_only_gets_worse_keeps_its_start(calibrated):
    from dataclasses import replace

    _, found = calibrated
    here, there = (replace(found.samples[0], softmax_scale=x) for x in (1.0, -1.0))
    head = Misled()
    result = fit(head, [here], there, FitOptions(steps=200, every=5, patience=3))
    assert result.after == result.before == 1.0 and result.steps == 15, "three looks without improvement"
    assert head.x.item() == 0.0
    assert fit(head, [there], there, FitOptions(steps=200, every=5)).after < 0.1


def test_the_gate_starts_from_the_means():
    """Without a rotation its logits are the mean of the query heads times the mean key, as the model scales them."""
    generator = torch.Generator().manual_seed(0)
    q, keys = torch.randn(2, 3, 4, 8, generator=generator), torch.randn(5, 2, C, 8, generator=generator)
    pooled = torch.cat((keys.amax(2), keys.amin(2), keys.mean(2)), -1)
    positions = torch.full((4,), 5 * C - 1)
    empty = torch.empty(0)
    sample = Sample(positions, q, q, empty, pooled, empty, torch.ones(4, 2, 5), empty, C, 0.3)
    head = GateHead(2, 3, 8, Rope(empty), softmax_scale=0.3, forced=(1, 1))
    truth = 0.3 * torch.einsum("htd,nhd->thn", q.mean(1), keys.mean(2))
    torch.testing.assert_close(head.logits(sample, torch.arange(4)).detach(), truth)


def test_importance_is_pooled_as_nosa_pools_it():
    """Blocks of 64: windows 4n - 1 .. 4n + 3 of 32 tokens every 16, those inside the text; the best mean counts."""
    tokens = torch.randn(2, 3 * 64, generator=torch.Generator().manual_seed(0))
    pooled = pool_windows(tokens, 64)
    for h in range(2):
        for n in range(3):
            starts = [16 * j for j in range(4 * n - 1, 4 * n + 4) if 0 <= 16 * j <= 3 * 64 - 32]
            best = max(float(tokens[h, s : s + 32].mean()) for s in starts)
            assert abs(float(pooled[h, n]) - best) < 1e-6


def test_replay_counts_mass_and_hits():
    """Two blocks of choice among eight, fixed scores: the first step loads, the later ones hit; what moves misses."""
    steps = WARM_QUERIES + 4
    positions = torch.arange(8 * C - steps, 8 * C)
    mass = torch.full((steps, 1, 8), 0.1)
    scores = torch.zeros(steps, 1, 8)
    scores[:, :, 3] = 1.0
    scores[:, :, 4] = 0.5
    scores[-1, :, 2] = 9.0  # wins over block 4 in the last step
    empty = torch.empty(0)
    sample = Sample(positions, empty, empty, empty, empty, empty, mass, empty, C, 1.0)
    score = replay(sample, Budget(blocks=4, sink=1, recent=1, share=0.0, capacity_ratio=1.0), scores, None)
    assert abs(score.recall - 0.5) < 1e-6, "four blocks of eight, all with the same mass"
    # of 3 steps: blocks 0, 3, 4 (7 is open until the last position): 3/3, 3/3; then 0, 2, 3, 7: block 2 misses
    assert abs(score.hit_rate - (1 + 1 + 3 / 4) / 3) < 1e-6


@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        ({"token_budget": 2 * C}, TOKENS, "the budget must leave a choice"),
        ({"token_budget": 9 * C}, TOKENS, "at most half the window"),
        ({"score_steps": 200}, TOKENS, "too short for 264 scored queries"),
    ],
)
def test_options_that_do_not_go_with_the_window_are_refused(changes, context, message):
    from dataclasses import replace

    with pytest.raises(CalibrationError, match=message):
        replace(OPTIONS, **changes).check(context)


def test_a_model_that_cannot_be_fitted_is_refused():
    windows = Windows([window(0)], window(1), window(2))
    with pytest.raises(CalibrationError, match="it has no full-attention layer"):
        calibrate(tiny_model("mistral-sliding"), windows, OPTIONS)
    model = tiny_model("llama")
    model.rheo = object()
    with pytest.raises(CalibrationError, match="it is offloaded"):
        calibrate(model, windows, OPTIONS)


def test_many_layers_take_several_passes(monkeypatch):
    """Samples of one layer at a time when memory is short, and the same result."""
    from rheo_offload.calibration import run

    model, windows = tiny_model("llama"), Windows([window(0)], window(1), window(2))
    options = CalibrationOptions(
        kind="eviction", block_size=C, token_budget=5 * C, score_steps=60, fit=FitOptions(steps=20, every=10)
    )
    whole = calibrate(model, windows, options)
    monkeypatch.setattr(run, "SAMPLE_BYTES", 1)
    stages = []

    from contextlib import contextmanager

    @contextmanager
    def progress(what, count):
        stages.append((what, count))
        yield lambda note: None

    parts = calibrate(model, windows, options, progress=progress)
    assert stages == [("reading", 3), ("fitting", 1)] * 2
    assert [f.after for f in parts.eviction.values()] == [f.after for f in whole.eviction.values()]
