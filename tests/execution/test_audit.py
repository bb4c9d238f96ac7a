"""The audit's figures per layer, against the stock arithmetic, and budgets that grow where too little is captured."""

import logging

import pytest
import torch

from rheo_offload import offload
from rheo_offload.errors import TraceError
from rheo_offload.execution.audit import Audit
from rheo_offload.execution.raised import RaisedBudgets
from rheo_offload.selection.policy import widened
from rheo_offload.trace import record
from rheo_offload.types import Policy
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import sparse_config

PROMPT = 180


def generate(model, new_tokens=24, rows=1):
    ids = torch.randint(3, 97, (rows, PROMPT), generator=torch.Generator().manual_seed(3)).to(model.device)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return made, model.rheo.stats()


def test_error_and_mass_of_every_layer():
    """A budget of everything errs by rounding only; a small one errs in every layer, and the figures add up."""
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config("mean_key", audit={"every": 2}, selection={"token_budget": 512}))
    stats = generate(model)[1]
    assert [audit.layer_idx for audit in stats.layers] == [0, 1]
    assert stats.output_error_max < 1e-3 and stats.captured_mass_min > 0.999
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config("mean_key", audit={"every": 2}))
    stats = generate(model)[1]
    assert all(0.01 < a.output_error_mean <= a.output_error_max for a in stats.layers)
    assert all(a.captured_mass_min <= a.captured_mass_mean < 0.999 for a in stats.layers)
    assert stats.output_error_max == max(a.output_error_max for a in stats.layers)
    assert stats.output_error_mean == pytest.approx(sum(a.output_error_mean for a in stats.layers) / 2)
    assert "attention output error" in stats.table() and stats.to_dict()["layers"][1]["layer_idx"] == 1


def test_the_error_is_that_of_the_output(monkeypatch):
    """One audited step: the relative distance of the outputs that the kernels themselves gave."""
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config("mean_key", audit={"every": 100}))
    seen = []
    original = Audit.record

    def spy(self, layer, *values):
        seen.append([value.clone() for value in values])
        original(self, layer, *values)

    monkeypatch.setattr(Audit, "record", spy)
    stats = generate(model, new_tokens=2)[1]
    for (lse, lse_all, out, out_all), audit in zip(seen, stats.layers, strict=True):
        want = (out.double() - out_all.double()).norm() / out_all.double().norm()
        assert audit.output_error_mean == pytest.approx(float(want), rel=1e-4)
        assert audit.captured_mass_mean == pytest.approx(float((lse - lse_all).exp().mean()), rel=1e-4)


def test_layers_that_capture_too_little_get_more(caplog):
    """Audits at steps 1, 5, 9, ...: the mass of one is judged at the next, so budgets grow there, up to the pool."""
    below = {"every": 4, "raise_below": 0.95}
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config("mean_key", audit=below, cache={"capacity_ratio": 2.0}))
    with caplog.at_level(logging.WARNING, "rheo_offload"):
        raised = generate(model)[1]
    assert raised.raised_budgets and all(raised.block_budget < b for b in raised.raised_budgets.values())
    assert all(b < raised.capacity_blocks for b in raised.raised_budgets.values())
    assert "captured" in caplog.text and "audit.raise_below is 0.950: budget" in caplog.text
    assert "fills the pool; raise cache.capacity_ratio" in caplog.text
    assert "layers with a larger budget" in raised.table()
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config("mean_key", audit={"every": 4}, cache={"capacity_ratio": 2.0}))
    plain = generate(model)[1]
    assert plain.raised_budgets == {} and plain.selected_blocks < raised.selected_blocks
    assert raised.captured_mass_mean > plain.captured_mass_mean


def test_a_raised_run_repeats_itself_and_ends_captured_steps():
    runs, versions = [], []
    for _ in range(2):
        model = tiny_model("llama", device=DEVICE)
        offload(
            model,
            sparse_config("mean_key", audit={"every": 4, "raise_below": 0.95}, cache={"capacity_ratio": 2.0}),
        )
        seen = []
        model.rheo.on_executor = lambda ex, seen=seen: seen.append(ex)
        made, stats = generate(model, rows=2)
        versions.append(seen[0].version)
        runs.append((made.tolist(), stats.raised_budgets))
    assert runs[0] == runs[1]
    assert versions[0][-1] == tuple(runs[0][1].items()) != ()


@pytest.mark.gpu
def test_a_raise_captures_the_step_anew():
    """Captured steps with raises in between give what eager steps give, from more than one capture."""
    made = {}
    for graph in ("auto", "off"):
        model = tiny_model("llama", device=DEVICE)
        audit = {"every": 8, "raise_below": 0.95}
        offload(
            model,
            sparse_config("mean_key", audit=audit, cache={"capacity_ratio": 2.0}, execution={"graph": graph}),
        )
        tokens, stats = generate(model, new_tokens=40)
        made[graph] = tokens.tolist(), stats.raised_budgets
        if graph == "auto":
            assert model.rheo._last.stepper.runner.captures > 1
    assert made["auto"] == made["off"] and made["auto"][1]


def test_enough_captured_raises_nothing():
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config("mean_key", audit={"every": 1, "raise_below": 0.01}))
    assert generate(model)[1].raised_budgets == {}


def test_a_recording_wants_one_budget():
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config("mean_key", audit={"every": 4, "raise_below": 0.9}))
    with pytest.raises(TraceError, match="raise_below=0"), record(model):
        generate(model, new_tokens=2)


def policy(budget, query, agnostic):
    return Policy(block_budget=budget, sink_blocks=1, recent_blocks=budget - 1 - query - agnostic,
                  query_blocks=query, agnostic_blocks=agnostic, heat_decay=0.9)  # fmt: skip


@pytest.mark.parametrize(
    ("query", "agnostic", "want"), [(4, 4, (8, 8)), (8, 0, (16, 0)), (2, 6, (4, 12)), (0, 0, (0, 0))]
)
def test_widened_keeps_the_shares(query, agnostic, want):
    more = widened(policy(12, query, agnostic), 20)
    assert (more.query_blocks, more.agnostic_blocks) == want
    assert more.sink_blocks + more.recent_blocks + more.query_blocks + more.agnostic_blocks == 20


class Layer:
    def __init__(self, capacity, max_blocks):
        self.capacity, self.max_blocks = capacity, max_blocks
        self.spec = type("Spec", (), {"layer_idx": 3})()


def test_raises_stay_inside_the_pool():
    """10 blocks -> 15 -> 19 of 20 slots; then the pool shrinks to 16 and grows to hold everything."""
    raised, layer, given = RaisedBudgets(0.9), Layer(20, 100), policy(10, 4, 4)
    raised.learn({3: 0.95}, {3: layer}, given)
    assert raised.blocks_of(layer, given) == 10 and not raised.layers
    for want in (15, 19, 19):
        raised.learn({3: 0.5}, {3: layer}, given)
        assert raised.blocks_of(layer, given) == want == raised.policy_of(layer, given).block_budget
    layer.capacity = 16
    assert raised.blocks_of(layer, given) == 15
    layer.capacity = 11
    assert raised.blocks_of(layer, given) == 10 and raised.policy_of(layer, given).query_blocks == 4
    layer.capacity = layer.max_blocks = 24
    raised.learn({3: 0.5}, {3: layer}, given)
    assert raised.blocks_of(layer, given) == 24, "a pool that holds every block needs no slot for the tail"
