"""Selections that serve several layers or several steps: the same blocks, nothing stale, and what is refused."""

import json
import re

import pytest
import torch

from rheo_offload import Engine, SamplingParams, offload, restore
from rheo_offload.engine import engine as engine_module
from rheo_offload.errors import ConfigError
from rheo_offload.model.reuse_plan import read_reuse_plan
from rheo_offload.model.specs import config_hash
from rheo_offload.trace.recorder import record
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_config, tiny_model
from tests.model.test_families import batch, drop_before_every_step
from tests.selection.test_head_classes import alphas  # noqa: F401  (a fixture)
from tests.test_end_to_end import BLOCK, greedy, prompt, sparse_config

NO_HEAT = {"query_agnostic_share": 0.0}


def four_layers():
    return tiny_model("llama", device=DEVICE, num_hidden_layers=4)


def recorded(model, ids, new=40, **kwargs):
    with record(model) as recorder:
        out = greedy(model, ids, new=new, **kwargs)
    return out, recorder.trace()


# ---- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mean_key", "quest", "moba"])
def test_layers_take_what_their_source_selected(method):
    """In every step and row, ids of layers 1 and 3 are those of 0, those of 2 its own; each has its own misses."""
    model, (ids, mask) = four_layers(), batch((300, 180))
    offload(model, sparse_config(method, 6, selection={"reuse_layers": {1: 0, 3: 0}}))
    _, trace = recorded(model, ids, attention_mask=mask)
    assert (trace.ids[1] == trace.ids[0]).all() and (trace.ids[3] == trace.ids[0]).all()
    assert (trace.ids[2] != trace.ids[0]).any()
    stats = model.rheo.stats()
    assert stats.evicted_blocks > 0 and 0 < stats.captured_mass_min < 1
    assert trace.misses[1].sum() == trace.misses[0].sum() > 0, "the same blocks of the same pool size miss"
    assert (trace.start_order[1] == trace.start_order[0]).all(), "warmed by the heat of their source"


def test_layers_that_reuse_keep_no_summaries():
    model = four_layers()
    offload(model, sparse_config(selection={"reuse_layers": {1: 0, 3: 0}}))
    cache = model.rheo.new_cache(max_length=100)
    greedy(model, prompt(60), past_key_values=cache)
    full = cache.executor.cache.full
    assert [full[i].summary is None for i in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("selection", [{"reuse_layers": {1: 0, 3: 2}}, {"reuse_steps": 4}])
def test_full_budget_equals_stock(selection):
    model, (ids, mask) = four_layers(), batch((120, 61, 7))
    expected = greedy(model, ids, attention_mask=mask)
    offload(model, sparse_config(budget_blocks=10, selection=selection))
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("selection", [{"reuse_layers": {1: 0, 3: 2}}, {"reuse_steps": 4}])
def test_eviction_changes_speed_only(selection):
    model, ids = four_layers(), prompt()
    offload(model, sparse_config(selection=selection))
    calm = greedy(model, ids)
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, ids), calm)
    hook.remove()


# ---- steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("method", ["mean_key", "infllm_v2", "quest", "arkvale"])
def test_a_selection_serves_n_steps_and_ends_with_its_block(method, steps):
    """Rows of unequal lengths have unequal phases: a list changes only where `(length - 1) % C` is a multiple of n."""
    model, (ids, mask) = four_layers(), batch((300, 190, 7))
    offload(model, sparse_config(method, 6, selection={"reuse_steps": steps}))
    _, trace = recorded(model, ids, attention_mask=mask)
    changes = 0
    for t in range(1, trace.steps):
        for row in range(3):
            length = int(trace.lens[t, row])
            same = (trace.ids[:, row, :, t] == trace.ids[:, row, :, t - 1]).all()
            due = (length - 1) % BLOCK % steps == 0
            assert due or same, f"row {row}, {length} tokens"
            changes += due and not same
            newest = trace.ids[:, row, :, t]
            assert (newest == (length - 1) // BLOCK).any(-1).all(), "the open block is there"
    assert changes > 0


def test_one_step_is_the_plain_path():
    """With n = block size and rows that begin a block, each selection is what a run without reuse selects there."""
    model, ids = four_layers(), prompt(289)
    offload(model, sparse_config(selection=NO_HEAT))
    plain, every = recorded(model, ids, new=8)
    restore(model)
    offload(model, sparse_config(selection=NO_HEAT | {"reuse_steps": 16}))
    kept, once = recorded(model, ids, new=8)
    assert (once.ids[:, :, :, 0] == every.ids[:, :, :, 0]).all()
    assert (once.ids[0] == once.ids[0][:, :, :1]).all()
    assert plain.shape == kept.shape


def test_nothing_is_kept_across_turns_rows_or_requests():
    """A row that was released or cropped selects anew: its tokens are those of the request alone."""
    model = four_layers()
    offload(model, sparse_config(selection=NO_HEAT | {"reuse_steps": 16}))
    prompts = [prompt(n, seed=n)[0].tolist() for n in (200, 201, 90, 202, 150)]
    with Engine(model, max_rows=2, max_context_tokens=300) as engine:
        together = engine.generate(prompts, SamplingParams(max_new_tokens=20))
    for ids, found in zip(prompts, together, strict=True):
        alone = greedy(model, torch.tensor([ids], device=DEVICE), new=20)[0, len(ids) :].tolist()
        assert found == alone


def test_rows_that_change_places_forget_their_lists():
    model = four_layers()
    offload(model, sparse_config(selection={"reuse_steps": 8}))
    cache = model.rheo.new_cache(max_length=330)
    greedy(model, prompt(300, rows=2), new=6, past_key_values=cache)
    kv = cache.executor.cache
    assert (kv.listed_at > 0).all()
    kv.reorder([1, 1])
    assert kv.listed_at.tolist()[0] == -1 and kv.listed_at.tolist()[1] > 0
    kv.release_row(1)
    assert kv.listed_at.tolist() == [-1, -1]


def test_a_row_that_moves_takes_its_lists_along(monkeypatch):
    """When others leave, a row moves down in the middle of a selection; that selection serves to its end."""
    monkeypatch.setattr(engine_module, "SETTLE_STEPS", 3)
    model = four_layers()
    offload(model, sparse_config(selection={"reuse_steps": 16, "reuse_layers": {1: 0}}))
    short, long = prompt(40, seed=1)[0], prompt(240, seed=2)[0]
    lists = {}

    class Observer:
        def before_step(self, rows): ...

        def begin(self, rows): ...

        def note(self, layer, workspace):
            for row, length in enumerate(kv.step_lens[: layer.rows].tolist()):
                if length >= 240:
                    lists[layer.spec.layer_idx, length] = workspace.selected_blocks[row].clone()

    with Engine(model, max_rows=2, max_context_tokens=300) as engine:
        kv, engine._ex.observer = engine._kv, Observer()
        first = engine.submit(short, SamplingParams(max_new_tokens=2))
        request = engine.submit(long, SamplingParams(max_new_tokens=14, ignore_eos=True))
        engine.step()
        assert request.row == 1
        while request.row == 1:
            engine.step()
        assert first.is_done and (kv.lengths[0] - 1) % BLOCK % 16 < 15, "it moved in the middle"
        engine.run()
    for layer in range(4):
        for length in range(242, 252):
            assert torch.equal(lists[layer, length], lists[layer, 241]), (layer, length)


def test_beams_and_drafts_still_decode():
    """Beams reorder and drafts crop between steps; at full budget both equal the stock model."""
    model, ids = tiny_model("llama", device=DEVICE), prompt(70)
    beams = model.generate(ids, max_new_tokens=16, num_beams=3, do_sample=False)
    drafts = model.generate(ids, max_new_tokens=16, prompt_lookup_num_tokens=3, do_sample=False)
    offload(model, sparse_config(budget_blocks=16, selection={"reuse_steps": 4}))
    assert torch.equal(model.generate(ids, max_new_tokens=16, num_beams=3, do_sample=False), beams)
    found = model.generate(ids, max_new_tokens=16, prompt_lookup_num_tokens=3, do_sample=False)
    assert torch.equal(found, drafts)


@pytest.mark.parametrize("selection", [{}, {"reuse_layers": {1: 0, 3: 0}}])
@pytest.mark.parametrize("heat_from", ["scores", "attention"])
def test_heat_changes_once_a_selection(selection, heat_from):
    """Whatever feeds it: steps that keep a selection leave heat alone, and layers that reuse one have no heat of their
    own."""
    model = four_layers()
    offload(model, sparse_config(selection=selection | {"heat_from": heat_from, "reuse_steps": 4}))
    cache = model.rheo.new_cache(max_length=330)
    ids = prompt(292, rows=2)
    greedy(model, ids, new=2, past_key_values=cache)  # 293 tokens
    full = cache.executor.cache.full
    for _ in range(8):
        before = [layer.heat.clone() for layer in full.values()]
        with torch.no_grad():
            model(ids[:, :1], past_key_values=cache)
        length = int(cache.executor.cache.seq_lens[0])
        changed = [not torch.equal(layer.heat, b) for layer, b in zip(full.values(), before, strict=True)]
        due = (length - 1) % BLOCK % 4 == 0
        assert changed == [due and i not in selection.get("reuse_layers", {}) for i in range(4)], length


def test_rules_layers_and_steps_compose():
    """A mass budget, a source for two layers and a selection for four steps: ids are shared, steps are kept."""
    model = four_layers()
    selection = NO_HEAT | {
        "budget": "mass",
        "budget_limit": 0.5,
        "reuse_layers": {2: 1, 3: 1},
        "reuse_steps": 4,
    }
    offload(model, sparse_config(budget_blocks=8, selection=selection | {"dense_layers": [0]}))
    _, trace = recorded(model, prompt())
    assert trace.meta["layers"] == [1, 2, 3] and (trace.ids[1] == trace.ids[0]).all()
    assert 3 <= model.rheo.stats().selected_blocks_mean < 8


@pytest.mark.gpu
@pytest.mark.parametrize("selection", [{"reuse_layers": {1: 0, 3: 0}}, {"reuse_steps": 4}])
def test_captured_steps_are_the_eager_ones(selection):
    model, (ids, mask) = four_layers(), batch((300, 181))
    config = sparse_config(selection=selection)
    offload(model, config)
    captured = greedy(model, ids, new=40, attention_mask=mask)
    restore(model)
    offload(model, config.with_overrides(["execution.graph=off"]))
    assert torch.equal(greedy(model, ids, new=40, attention_mask=mask), captured)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "selection", "message"),
    [
        (
            "mean_key",
            {"reuse_layers": {1: 9}},
            "layer 1 cannot reuse layer 9: the model has 4 layers, 9 is none",
        ),
        ("mean_key", {"reuse_layers": {1: 1}}, "layer 1 cannot reuse layer 1: a source comes earlier"),
        ("mean_key", {"reuse_layers": {2: 1}, "dense_layers": [1]}, "layer 1 is in selection.dense_layers"),
        ("mean_key", {"reuse_layers": {2: 1, 1: 0}}, "layer 1 reuses layer 0 itself; name that one"),
        ("streaming", {"reuse_layers": {1: 0}}, "selection.reuse_layers: method 'streaming' does not score"),
        ("full", {"reuse_steps": 2}, "selection.reuse_steps: method 'full' does not score"),
        ("power", {"reuse_steps": 2}, "selection.reuse_steps: method 'power' does not score"),
        (
            "h2o",
            {"reuse_steps": 2},
            "selection.reuse_steps: method 'h2o' ranks blocks, or tokens of blocks, anew",
        ),
        (
            "hisa",
            {"reuse_layers": {1: 0}},
            "selection.reuse_layers: method 'hisa' ranks blocks, or tokens of blocks",
        ),
        (
            "mean_key",
            {"reuse_layers": {1: 0}, "remainder": "centroid"},
            "selection.remainder centroid needs the mean",
        ),
        ("mean_key", {"reuse_steps": 0}, "selection.reuse_steps must be at least 1, not 0"),
        ("mean_key", {"reuse_layers": {"a": 0}}, "selection.reuse_layers must be pairs of integers or text"),
        (
            "mean_key",
            {"reuse_layers": "/nowhere.json"},
            "selection.reuse_layers: cannot read '/nowhere.json'",
        ),
    ],
)
def test_what_means_nothing_is_refused(method, selection, message):
    model = tiny_model("llama", num_hidden_layers=4)
    with pytest.raises(ConfigError, match=re.escape(message)):
        offload(model, sparse_config(method, selection=selection))
    assert not hasattr(model, "rheo")


@pytest.mark.parametrize("selection", [{"reuse_layers": {1: 0}}, {"reuse_steps": 2}])
def test_budgets_that_are_raised_cannot_be_reused(selection):
    with pytest.raises(ConfigError, match="audit.raise_below gives layers budgets of their own"):
        offload(tiny_model("llama"), sparse_config(selection=selection, audit={"raise_below": 0.9}))


def test_sliding_layers_cannot_reuse():
    model = tiny_model("gemma3")
    with pytest.raises(ConfigError, match="layer 0 has a sliding window and selects nothing"):
        offload(model, sparse_config(selection={"reuse_layers": {1: 0}}))


def test_heads_of_other_classes_cannot_reuse(alphas):  # noqa: F811
    model = tiny_model("llama", device=DEVICE)
    params = {"heads": alphas}
    with pytest.raises(ConfigError, match="layer 1 cannot reuse layer 0: other heads stream in layer 0"):
        offload(model, sparse_config("duo", 8, selection={"params": params, "reuse_layers": {1: 0}}))
    params = params | {"sparsity": 0.0}
    offload(model, sparse_config("duo", 8, selection={"params": params, "reuse_layers": {1: 0}}))


def test_a_plan_of_another_model_is_refused(tmp_path):
    config, other = tiny_config("llama"), tiny_config("qwen3")
    plan = {"format": 1, "model": "llama", "config_hash": config_hash(config), "layers": {"1": 0}}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    assert read_reuse_plan(str(file), config) == {1: 0}
    with pytest.raises(ConfigError, match="is a plan for llama .* not for this qwen3 model"):
        read_reuse_plan(str(file), other)
    for text, message in (
        ("{", "is no plan"),
        ("[]", "is no plan"),
        (json.dumps(plan | {"format": 2}), "format 2"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_reuse_plan(str(file), config)
    file.write_text(json.dumps(plan))
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config(selection={"reuse_layers": str(file)}))
    assert model.rheo._reuse == {1: 0}
