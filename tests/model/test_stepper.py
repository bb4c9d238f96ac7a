"""Captured steps are eager steps: the same tokens and tables, whatever joins, leaves or is dropped in between."""

import gc
from functools import partial

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria, TopKLogitsWarper, TopPLogitsWarper

from rheo_offload import CacheError, offload
from rheo_offload.engine.engine import Engine
from rheo_offload.errors import EngineError, GraphError, RheoError
from rheo_offload.execution import graph
from rheo_offload.execution.sampler import Sampler, SamplingParams
from rheo_offload.metrics.clock import RunClock
from rheo_offload.model.decode_loop import DecodeLoop, stepper_of
from rheo_offload.model.generation import sampling_params
from rheo_offload.model.stepper import STEPS_IN_FLIGHT, Stepper
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import FAMILIES, tiny_model
from tests.model.test_families import batch
from tests.test_end_to_end import greedy, prompt, sparse_config

# no slack and no heat: the selection moves, so that blocks are evicted and loaded in every family
TIGHT = dict(audit={"every": 0}, cache={"capacity_ratio": 1.0}, selection={"query_agnostic_share": 0.0})


def prefilled(model, lengths=(150, 70), new=48):
    ids, mask = batch(lengths)
    cache = model.rheo.new_cache(max_length=max(lengths) + new)
    model.rheo.prefill(cache, ids, mask)
    return cache


def new_stepper(model, cache, **kwargs):
    kv = cache.executor.cache
    sampler = Sampler(kv.rows, model.get_output_embeddings().weight.shape[0], kv.device, cache.executor.ops)
    return Stepper(model, cache, sampler, **kwargs)


def run(stepper, steps, first=5):
    """Tokens [steps, rows] of a stepper whose rows all begin with token `first`."""
    stepper.ids.fill_(first)
    return torch.stack([torch.from_numpy(stepper.read(stepper.launch()).tokens) for _ in range(steps)])


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_captured_and_equals_its_eager_steps(family):
    model = offload(tiny_model(family, device=DEVICE), sparse_config(**TIGHT))
    caches = [prefilled(model) for _ in range(2)]
    eager, captured = (new_stepper(model, c, graph=g) for c, g in zip(caches, (False, True), strict=True))
    with model._optimize_model_for_decode():
        assert torch.equal(run(eager, 40), run(captured, 40))
    assert captured.runner.captures == 1 and captured.runner.why_eager(2, "greedy") is None
    for i, layer in caches[1].executor.cache.full.items():
        twin = caches[0].executor.cache.full[i]
        assert torch.equal(layer.slot_of, twin.slot_of) and torch.equal(layer.counters, twin.counters)
        assert int(layer.counters[..., 4].sum()) > 0, "blocks were evicted and loaded inside the graph"
        assert int(layer.traffic_of("loaded")) > 0


@pytest.mark.gpu
def test_a_replayed_step_never_waits():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(**TIGHT))
    cache = prefilled(model)
    stepper = new_stepper(model, cache)
    run(stepper, 4)
    assert stepper.runner.captured
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tickets = [stepper.launch() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(stepper.read(t).tokens) for t in tickets] == [2, 2, 2]


def test_tokens_are_what_generate_gives():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(**TIGHT))
    ids = prompt(150)
    expected = greedy(model, ids)[0, ids.shape[1] :]
    cache = model.rheo.new_cache(max_length=200)
    model.rheo.prefill(cache, ids[:, :-1])
    assert torch.equal(run(new_stepper(model, cache), len(expected), ids[0, -1])[:, 0], expected.cpu())


def test_a_step_over_some_rows_leaves_the_others_alone():
    """Row 2 sits out three steps; its next tokens are those it would have had, and nothing of it was written."""
    model = offload(tiny_model("gemma3", device=DEVICE), sparse_config(**TIGHT))
    lengths = (150, 70, 90)
    together = prefilled(model, lengths)
    expected = run(new_stepper(model, together), 6)
    cache = prefilled(model, lengths)
    stepper, kv = new_stepper(model, cache), cache.executor.cache
    stepper.ids.fill_(5)
    kv.active[2] = 0
    first = [stepper.read(stepper.launch([0, 1])).tokens[:2] for _ in range(3)]
    kv.check_integrity()
    kv.active[2] = 1
    late = [stepper.read(stepper.launch([0, 1, 2])).tokens for _ in range(3)]
    for step in range(3):
        assert (first[step] == expected[step, :2].numpy()).all()
        assert (late[step][:2] == expected[3 + step, :2].numpy()).all()
        assert late[step][2] == expected[step, 2]
    kv.check_integrity()


def test_the_step_itself_ends_rows():
    """Row 0 ends with a stop token, row 1 with its last remaining token: the step notices, the host only reads it."""
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(**TIGHT))
    free = run(new_stepper(model, prefilled(model)), 8)
    cache = prefilled(model)
    stepper = new_stepper(model, cache, retire=True)
    stepper.stop_ids[0, 0] = free[2, 0]
    stepper.remaining[1] = 5
    stepper.ids.fill_(5)
    seen = [stepper.read(stepper.launch()) for _ in range(8)]
    stop = next(i for i in range(8) if free[i, 0] == free[2, 0])
    assert [s.done[0] for s in seen].index(True) == stop and [s.done[1] for s in seen].index(True) == 4
    assert cache.executor.cache.seq_lens.tolist() == [149 + stop + 2, 69 + 1 + 5], "ended rows do not grow"
    assert (seen[-1].tokens == [free[stop, 0], free[4, 1]]).all()


def test_a_row_that_ends_goes_on_with_padding_unless_it_retires():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(**TIGHT))
    stepper = new_stepper(model, prefilled(model))
    stepper.pad_ids.fill_(42)
    stepper.remaining[0] = 2
    tokens = run(stepper, 5)
    assert (tokens[2:, 0] == 42).all() and (tokens[:2, 0] != 42).any()


def test_a_changed_model_is_noticed():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    stepper = new_stepper(model, prefilled(model))
    run(stepper, 1)
    lengths = list(stepper.cache.executor.cache.lengths)
    model.config._attn_implementation = "eager"
    with pytest.raises(GraphError, match="restore"):
        stepper.launch()
    model.config._attn_implementation = "rheo"
    assert stepper.cache.executor.cache.lengths == lengths, "nothing was queued"
    model.to(torch.float64)
    with pytest.raises(GraphError, match="dtype"):
        stepper.launch()


def test_only_the_last_steps_can_be_read():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    stepper = new_stepper(model, prefilled(model))
    for _ in range(STEPS_IN_FLIGHT + 1):
        stepper.launch()
    with pytest.raises(ValueError, match="last 4 of 5"):
        stepper.read(0)
    with pytest.raises(ValueError, match="last 4 of 5"):
        stepper.read(5)


def test_a_second_turn_keeps_its_stepper():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(budget_blocks=16))
    cache = model.rheo.new_cache(max_length=300)
    first = greedy(model, prompt(60), past_key_values=cache)
    stepper = cache.stepper
    assert stepper is not None and stepper is stepper_of(model, cache)
    greedy(model, torch.cat([first, prompt(20, seed=4)], 1), past_key_values=cache)
    assert cache.stepper is stepper


@pytest.mark.gpu
def test_run_after_run_takes_no_more_device_memory():
    """Every `generate` captures for a cache of its own, which goes with its graphs and their memory."""
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(**TIGHT))
    held = []
    for seed in range(12):
        greedy(model, prompt(100, seed=seed))
        assert model.rheo._last.stepper.runner.captured
        gc.collect()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    allocated, reserved = zip(*held[3:], strict=True)
    assert max(allocated) - min(allocated) < 1 << 20 and max(reserved) - min(reserved) < 64 << 20


def test_sampling_is_the_same_in_any_row():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(**TIGHT))
    params = SamplingParams(temperature=0.9, top_k=30, top_p=0.95, seed=11)
    ids, mask = batch((150, 70))
    drawn = []
    for order, row in [([0, 1], 1), ([1, 0], 0), ([1], 0)]:
        cache = model.rheo.new_cache(max_length=200)
        model.rheo.prefill(cache, ids[order], mask[order])
        stepper = new_stepper(model, cache)
        for r in range(len(order)):
            stepper.sampler.set_row(r, params)
        drawn.append(run(stepper, 12)[:, row])
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], drawn[1]) and len(set(drawn[0].tolist())) > 3


@pytest.mark.parametrize("where", ["model.layers.0", "lm_head"])
def test_a_cache_whose_step_stopped_half_way_is_not_gone_on_with(where, monkeypatch):
    """Ctrl-C in the fourth step, then a turn of one token: the device has counted a token that the host has not."""
    monkeypatch.setattr(graph, "EAGER_STEPS", 100)  # every step is launched by the host, on a GPU too
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    ids, cache, calls = prompt(60), model.rheo.new_cache(max_length=200), []
    expected = greedy(model, ids)

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 4 + (where != "lm_head") * 2:  # two chunks of the prompt run through a layer as well
            raise KeyboardInterrupt

    with model.get_submodule(where).register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
        greedy(model, ids, past_key_values=cache)
    with pytest.raises(CacheError, match="half-way"):
        greedy(model, expected[:, : cache.hf_length + 1], past_key_values=cache)


class OnlySeven(TemperatureLogitsWarper):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7], device=scores.device), 0.0)


class AfterTwo(MaxTimeCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 62, device=input_ids.device)


def test_a_subclass_of_a_known_processor_or_criterion_is_heard():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    ids = prompt(60)
    made = greedy(model, ids, logits_processor=[OnlySeven(2.0)], stopping_criteria=[AfterTwo(1e9)])
    assert made[0, 60:].tolist() == [7, 7]


def test_the_shortest_of_several_lengths_counts():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    limits = [MaxLengthCriteria(70), MaxLengthCriteria(65)]
    assert greedy(model, prompt(60), stopping_criteria=limits).shape[1] == 65


def test_processors_in_an_unusual_order_run_in_transformers_loop():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config())
    loop = DecodeLoop(model.rheo.new_cache(), RunClock(), LogitsProcessor, StoppingCriteria)
    how = GenerationConfig(do_sample=True)
    usual = [TemperatureLogitsWarper(0.5), TopKLogitsWarper(5), TopPLogitsWarper(0.9)]
    assert not loop._why_not(model, usual, [], how)
    for odd in (usual[::-1], [usual[0], usual[2], usual[2]]):
        assert "in this order" in loop._why_not(model, odd, [], how)


def test_a_vocabulary_beyond_the_sampler_runs_in_transformers_loop(monkeypatch):
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(**TIGHT))
    expected = greedy(model, prompt(150), decode_tail_tokens=9)
    monkeypatch.setattr("csrc_free_kernels.reference.sample_greedy.MAX_VOCABULARY", 96)
    assert torch.equal(greedy(model, prompt(150), decode_tail_tokens=9), expected)
    assert model.rheo._last.stepper is None
    with pytest.raises(EngineError, match="96"):
        Engine(model, max_rows=1, max_context_tokens=64)


def test_an_engines_parameters_are_those_that_generate_would_use():
    """What the call does not say comes from the model's generation_config; what an engine cannot do is named."""
    model = tiny_model("llama")
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=9, top_p=0.8)
    of = partial(sampling_params, model, max_new_tokens=5)
    assert of() == SamplingParams(temperature=0.7, top_k=9, top_p=0.8, max_new_tokens=5)
    assert of(temperature=1.0, top_p=1.0) == SamplingParams(temperature=1.0, top_k=9, max_new_tokens=5)
    assert of(do_sample=False) == SamplingParams(max_new_tokens=5)
    for odd, name in [
        (dict(repetition_penalty=1.2), "RepetitionPenalty"),
        (dict(num_beams=3), "beam sample"),
        (dict(stop_strings=["."]), "stop_strings"),
    ]:
        with pytest.raises(RheoError, match=f"it has no {name}"):
            of(**odd)
