"""The index of two levels through `generate` on tiny models: flat when it opens everything, bounds that never age."""

import pytest
import torch

from rheo_offload import ConfigError, Engine, RheoConfig, SamplingParams, offload, restore
from rheo_offload.cache import kv_cache as kv_cache_module
from rheo_offload.cache.sizing import plan_memory
from rheo_offload.engine import engine as engine_module
from rheo_offload.execution.executor import Executor
from rheo_offload.model.specs import layer_specs
from rheo_offload.selection.index import AUTO_BLOCKS, Index, groups_to_open
from rheo_offload.trace.recorder import record
from rheo_offload.types import Policy
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.model.test_families import batch, drop_before_every_step
from tests.selection.test_head_classes import alphas  # noqa: F401  (a fixture)
from tests.test_end_to_end import BLOCK, greedy, prompt, sparse_config

GROUP = 4
SPAN = GROUP * BLOCK


def long_model(family="llama", **overrides):
    return tiny_model(family, device=DEVICE, max_position_embeddings=2048, **overrides)


def indexed(method="mean_key", budget_blocks=6, keep=0.125, **groups):
    selection = {"index": "two_level", "index_group": GROUP, "index_keep": keep} | groups.pop("selection", {})
    return sparse_config(method, budget_blocks, selection=selection, **groups)


@pytest.fixture
def always(monkeypatch):
    """Let layers open groups also where the table is too short to gain from it."""

    def groups_of(self, layer):
        found = layer.group_bounds is not None and not self.is_dense(layer) and self.source_of(layer) is None
        return groups_to_open(self.policy_of(layer), layer.max_blocks, self.index) if found else None

    monkeypatch.setattr(Executor, "groups_of", groups_of)


def recorded(model, ids, new=24, **kwargs):
    with record(model) as recorder:
        out = greedy(model, ids, new=new, **kwargs)
    return out, recorder.trace()


def assert_bounds(kv):
    """Every complete group of every row has the extremes of its blocks' summaries, and there are some."""
    checked = 0
    for layer in kv.full.values():
        if layer.group_bounds is None:
            continue
        for row, tokens in enumerate(kv.lengths):
            for m in range(tokens // SPAN):
                keys = layer.summary[kv.host_table[row, m * GROUP : (m + 1) * GROUP].long(), :, 0]
                bounds = torch.stack((keys.amax(0), keys.amin(0)), 1)
                assert torch.equal(layer.group_bounds[row, :, m], bounds), (layer.spec.layer_idx, row, m)
                checked += 1
    assert checked


# ---- all groups open -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_groups_open_is_flat(always, family):
    """The same tokens, selections, tables and heat, over ragged rows that complete groups while they decode."""
    found = []
    for config in (sparse_config(), indexed(keep=1.0)):
        model, (ids, mask) = long_model(family), batch((300, 181, 7))
        offload(model, config)
        cache = model.rheo.new_cache(max_length=340)
        out, trace = recorded(model, ids, attention_mask=mask, past_key_values=cache)
        kv = cache.executor.cache
        tables = [(layer.slot_of.clone(), layer.heat.clone()) for layer in kv.full.values()]
        found.append((out, trace, tables))
        if config.selection.index == "two_level":
            assert_bounds(kv)
        restore(model)
    (flat, plain, tables), (out, trace, own) = found
    assert torch.equal(out, flat) and (trace.ids == plain.ids).all() and (trace.misses == plain.misses).all()
    assert trace.misses.sum() > 0
    for (slot_of, heat), (own_slots, own_heat) in zip(tables, own, strict=True):
        assert torch.equal(own_slots, slot_of)
        torch.testing.assert_close(own_heat, heat)


def test_beams_and_drafts_are_flat_too(always):
    """Beams reorder rows and drafts crop them between steps."""
    model, ids = long_model(), prompt(200)
    kinds = (dict(num_beams=3), dict(prompt_lookup_num_tokens=3))
    offload(model, sparse_config())
    flat = [model.generate(ids, max_new_tokens=40, do_sample=False, **kind) for kind in kinds]
    restore(model)
    offload(model, indexed(keep=1.0))
    for kind, want in zip(kinds, flat, strict=True):
        cache = model.rheo.new_cache(max_length=256)
        got = model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache, **kind)
        assert torch.equal(got, want)
        assert_bounds(cache.executor.cache)


# ---- some groups open ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selection", [{}, {"reuse_steps": 4}, {"reuse_layers": {1: 0}}, {"query_agnostic_share": 0.0}]
)
def test_eviction_changes_speed_only(selection):
    model, ids = long_model(), prompt(900)
    offload(model, indexed(selection=selection))
    cache = model.rheo.new_cache(max_length=1000)
    calm = greedy(model, ids, new=80, past_key_values=cache)
    stats = model.rheo.stats()
    assert stats.evicted_blocks > 0 and stats.miss_blocks > 0 and 0 < stats.captured_mass_mean < 1
    assert cache.executor.groups_of(cache.executor.cache.full[0]).candidates < 64
    assert_bounds(cache.executor.cache)
    hook = drop_before_every_step(model)
    assert torch.equal(
        greedy(model, ids, new=80, past_key_values=model.rheo.new_cache(max_length=1000)), calm
    )
    hook.remove()


@pytest.mark.parametrize("method", ["mean_key", "hisa"])
def test_what_is_selected_lies_in_open_groups(method):
    model, ids = long_model(), prompt(900, rows=2)
    offload(model, indexed(method))
    cache = model.rheo.new_cache(max_length=1000)
    seen = set()

    class Observer:
        def before_step(self, rows): ...

        def begin(self, rows): ...

        def note(self, layer, ws):
            group = ws.selected_blocks // GROUP
            assert (group[..., None] == ws.open_groups[:, :, None]).any(-1)[ws.selected_blocks >= 0].all()
            assert (ws.num_open == ws.groups.listed).all()
            seen.add((layer.spec.layer_idx, *ws.open_groups[0, 0].tolist()))

    model.rheo.on_executor = lambda ex: setattr(ex, "observer", Observer())
    greedy(model, ids, new=40, past_key_values=cache)
    assert len(seen) > 4, "which groups are open changes"


def test_ragged_rows_equal_each_alone_in_a_table_as_long():
    model, (ids, mask) = long_model(), batch((900, 290, 7))
    offload(model, indexed())
    cache = model.rheo.new_cache(max_length=1000)
    together = greedy(model, ids, attention_mask=mask, past_key_values=cache)[:, ids.shape[1] :]
    assert_bounds(cache.executor.cache)
    for row, n in enumerate((900, 290, 7)):
        alone = model.rheo.new_cache(max_length=1000)
        found = greedy(model, ids[row : row + 1, -n:], past_key_values=alone)[:, n:]
        assert torch.equal(found[0], together[row]), f"row {row}"


def test_rows_that_move_keep_their_bounds(monkeypatch):
    """In an engine rows leave, others move down, and the slots are shared out anew: tokens as of each request alone."""
    monkeypatch.setattr(engine_module, "SETTLE_STEPS", 3)
    model = long_model()
    offload(model, indexed())
    prompts = [prompt(n, seed=n)[0].tolist() for n in (30, 700, 640, 90)]
    wanted = [2, 80, 70, 12]
    with Engine(model, max_rows=3, max_context_tokens=800) as engine:
        requests = [
            engine.submit(ids, SamplingParams(max_new_tokens=n, ignore_eos=True))
            for ids, n in zip(prompts, wanted, strict=True)
        ]
        while engine.step():
            pass
        together = [r.output_ids for r in requests]
    for ids, n, found in zip(prompts, wanted, together, strict=True):
        with Engine(model, max_rows=1, max_context_tokens=800) as engine:
            alone = engine.generate([ids], SamplingParams(max_new_tokens=n, ignore_eos=True))[0]
        assert list(found) == list(alone)


def test_reordered_and_moved_rows_hold_what_their_source_held():
    model = long_model()
    offload(model, indexed())
    cache = model.rheo.new_cache(max_length=800)
    greedy(model, prompt(700, rows=3), new=6, past_key_values=cache)
    kv = cache.executor.cache
    kv.reorder([1, 1, 0])
    assert_bounds(kv)
    kv.release_row(0)
    kv.move_row(2, 0)
    assert_bounds(kv)
    kv.release_row(1)
    assert_bounds(kv)


def test_a_table_that_grows_begins_to_open_groups():
    """While it is short all blocks are ranked and no bounds are kept; afterwards all of them are there."""
    model = long_model()
    offload(model, indexed())
    cache = model.rheo.new_cache()
    out = greedy(model, prompt(180), new=40, past_key_values=cache)
    executor = cache.executor
    assert executor.groups_of(executor.cache.full[0]) is None, "too short to gain"
    longer = torch.cat((out, prompt(500, seed=5)), 1)
    out = greedy(model, longer, new=40, past_key_values=cache)
    assert executor.groups_of(executor.cache.full[0]) is not None
    assert_bounds(executor.cache)
    executor.cache.check_integrity()


@pytest.mark.parametrize("at", ["tables", "bounds"])
def test_growing_on_a_full_device_tries_again_and_loses_nothing(monkeypatch, at):
    """The first try ends in a layer whose old tables are gone already."""
    model = long_model()
    offload(model, indexed(method="mean_key"))
    cache = model.rheo.new_cache()
    greedy(model, prompt(300), new=8, past_key_values=cache)
    kv = cache.executor.cache
    held = kv.host_table[0, : kv.lengths[0] // BLOCK].long()
    for layer in kv.full.values():  # pages that nothing was written to hold anything
        others = torch.ones(len(layer.summary), dtype=torch.bool, device=DEVICE).index_fill(0, held, False)
        layer.summary[others] = torch.nan
    before = {i: (layer.heat.clone(), layer.summary[held]) for i, layer in kv.full.items()}
    name = {"tables": "FullLayer", "bounds": "complete_groups"}[at]
    real, tries = getattr(kv_cache_module, name), []

    def full_once(*args, **kwargs):
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("simulated")
        return real(*args, **kwargs)

    monkeypatch.setattr(kv_cache_module, name, full_once)
    cache.executor.make_room(kv.max_blocks * BLOCK + 1)
    assert len(tries) > 1
    for i, layer in kv.full.items():
        heat, summary = before[i]
        assert heat.any() and torch.equal(layer.heat[..., : heat.shape[2]], heat)
        assert summary.isfinite().all() and torch.equal(layer.summary[held], summary)
    assert_bounds(kv)
    restore(model)


def test_only_layers_that_rank_blocks_keep_bounds():
    model = long_model(num_hidden_layers=4)
    offload(model, indexed(selection={"reuse_layers": {3: 2}, "dense_layers": [1]}))
    cache = model.rheo.new_cache(max_length=800)
    greedy(model, prompt(600), new=4, past_key_values=cache)
    full = cache.executor.cache.full
    assert [full[i].group_bounds is None for i in range(4)] == [False, True, False, True]
    assert [cache.executor.groups_of(full[i]) is None for i in range(4)] == [False, True, False, True]


def test_raised_budgets_find_their_blocks():
    """A layer that may take more blocks opens more groups, and goes on opening them."""
    model, ids = long_model(), prompt(900)
    offload(model, indexed(audit={"every": 2, "raise_below": 0.99}, cache={"capacity_ratio": 4.0}))
    out = greedy(model, ids, new=80)
    assert model.rheo.stats().raised_budgets
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, ids, new=80), out)
    hook.remove()


# ---- numbers -------------------------------------------------------------------------------------------------------


def policy(budget, sink, recent, query, agnostic):
    return Policy(
        block_budget=budget, sink_blocks=sink, recent_blocks=recent, query_blocks=query, agnostic_blocks=agnostic,
        heat_decay=0.9,
    )  # fmt: skip


@pytest.mark.parametrize("keep", [0.01, 0.125, 1.0])
@pytest.mark.parametrize("size", [4, 16, 64])
@pytest.mark.parametrize(
    "shares", [(64, 1, 16, 24, 23), (9, 0, 1, 8, 0), (256, 5, 66, 0, 185), (4, 1, 1, 1, 1)]
)
def test_open_groups_hold_what_a_step_needs(shares, size, keep):
    for blocks in (shares[0], 1000, 32768):
        p = policy(*shares)
        groups = groups_to_open(p, blocks, Index(group_blocks=size, keep=keep))
        assert groups.sink_groups * size >= p.sink_blocks and groups.recent_groups >= 2
        # the recent blocks may end with a group that has one block
        assert (groups.recent_groups - 1) * size + 1 >= p.recent_blocks
        total = -(-blocks // size)
        assert groups.listed <= max(total + 1, groups.sink_groups + groups.recent_groups + 2)
        if groups.listed <= total:  # else every group is open
            assert groups.query_groups >= keep * total - 1e-9
            assert groups.query_groups * size >= 2 * p.query_blocks
            assert groups.agnostic_groups * size >= 2 * p.agnostic_blocks
        assert (groups.agnostic_groups > 0) == (p.agnostic_blocks > 0)
        assert (groups.listed - 1) * size + 1 >= p.block_budget


@pytest.mark.parametrize(("blocks", "budget"), [(2048, 1458), (4096, 3280), (32768, 24000), (32768, 32768)])
def test_a_raised_budget_opens_no_more_groups_than_there_are(blocks, budget):
    raised = policy(budget, 1, 32, (budget - 33) // 2, budget - 33 - (budget - 33) // 2)
    groups = groups_to_open(raised, blocks, Index(group_blocks=32, keep=0.09))
    assert groups.listed == blocks // 32 + 1 and groups.query_groups > 0 and groups.agnostic_groups > 0
    assert (groups.listed - 1) * 32 + 1 >= budget


def test_heat_alone_opens_room_for_what_it_takes():
    groups = groups_to_open(policy(128, 1, 32, 0, 95), 4096, Index(group_blocks=4, keep=0.01))
    assert groups.agnostic_groups * 4 >= 2 * 95


def test_numbers_at_a_million_tokens():
    groups = groups_to_open(policy(128, 1, 32, 48, 47), 32768, Index(group_blocks=16, keep=0.125))
    assert (groups.sink_groups, groups.recent_groups) == (1, 3)
    assert (groups.query_groups, groups.agnostic_groups, groups.candidates) == (256, 128, 388 * 16)


def test_a_share_that_comes_out_even_is_not_rounded_up():
    """0.1 * 30 is a little above 3 as a float."""
    assert groups_to_open(policy(9, 0, 1, 4, 0), 120, Index(group_blocks=4, keep=0.1)).query_groups == 3


def test_bounds_are_counted():
    specs = layer_specs(long_model().config)
    plans = [
        plan_memory(
            specs, rows=3, max_blocks=70, block_size=BLOCK, block_budget=6, capacity_ratio=1.5, summary_width=1,
            stage_blocks=0, dtype=torch.float32, group_blocks=size,
        )
        for size in (0, GROUP)
    ]  # fmt: skip
    model = long_model()
    kept = []
    for config in (sparse_config(), indexed()):
        offload(model, config)
        cache = model.rheo.new_cache(max_length=70 * BLOCK)
        greedy(model, prompt(600, rows=3), new=2, past_key_values=cache)
        kept.append(cache.executor.cache.device_bytes)
        restore(model)
    assert plans[1].device_kv_bytes - plans[0].device_kv_bytes == kept[1] - kept[0] > 0
    assert plans[1].summary_bytes - plans[0].summary_bytes == kept[1] - kept[0]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "selection", "why"),
    [
        ("quest", {}, "does not rank blocks by one mean key"),
        ("infllm_v2", {}, "does not rank blocks by one mean key"),
        ("moba", {}, "does not rank blocks by one mean key"),
        ("streaming", {}, "does not rank blocks by one mean key"),
        ("full", {}, "does not rank blocks by one mean key"),
        ("token_select", {}, "does not rank blocks by one mean key"),
        ("h2o", {}, "does not rank blocks by one mean key"),
        ("hisa", {"params": {"scorer": "quest"}}, "does not rank blocks by one mean key"),
        ("mean_key", {"budget": "mass", "budget_limit": 0.9}, "variable budget"),
        ("mean_key", {"budget": "threshold", "budget_limit": 0.1}, "variable budget"),
        ("mean_key", {"heat_from": "attention"}, "heat from attention"),
    ],
)
def test_refused_with_the_reason(method, selection, why):
    with pytest.raises(ConfigError, match=f"selection.index 'two_level': .*{why}"):
        offload(long_model(), indexed(method, selection=selection))


def test_auto_opens_groups_of_long_tables_where_it_can():
    """What `two_level` would refuse, `auto` ranks whole; a table below its length keeps no bounds."""
    model = long_model()
    offload(model, indexed(selection={"index": "auto"}))
    kept = []
    for blocks in (AUTO_BLOCKS - 1, AUTO_BLOCKS):
        cache = model.rheo.new_cache(max_length=blocks * BLOCK)
        greedy(model, prompt(300), new=2, past_key_values=cache)
        layer = cache.executor.cache.full[0]
        kept.append((layer.group_bounds is None, cache.executor.groups_of(layer) is None))
    assert kept == [(True, True), (False, False)]
    restore(model)
    offload(model, indexed("quest", selection={"index": "auto"}))
    greedy(model, prompt(300), new=2)


def test_streaming_heads_are_refused(alphas):  # noqa: F811
    config = indexed("duo", selection={"params": {"heads": str(alphas)}})
    with pytest.raises(ConfigError, match="selection.index"):
        offload(long_model(), config)


@pytest.mark.parametrize(
    "values",
    [{"index": "tree"}, {"index_group": 3}, {"index_group": 128}, {"index_keep": 0.0}, {"index_keep": 1.5}],
)
def test_values_out_of_range(values):
    with pytest.raises(ConfigError, match=f"selection.{next(iter(values))}"):
        RheoConfig.from_dict({"selection": values})
