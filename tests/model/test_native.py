"""Models trained natively, from end to end: what is served is what was trained, in the engine too."""

import copy
import json

import pytest
import torch

from bench.native_attention import Geometry, Pass
from bench.train_native import TINY, Recipe, build_model, importance_tensors, read_weights
from rheo_offload import Engine, RheoConfig, offload
from rheo_offload.eval.recall import ask, draw_sequence
from rheo_offload.execution.sampler import SamplingParams
from rheo_offload.model import loader
from rheo_offload.model.learned_heads import HeadsInfo, read_heads, save_heads
from rheo_offload.model.specs import layer_specs
from rheo_offload.selection.policy import make_policy, make_selector
from tests.helpers.homes import DEVICE
from tests.helpers.tolerance import assert_close, relative_error

STEPS = 40
TIGHT = ["cache.device_memory=floor", "cache.capacity_ratio=1.0", "cache.host_memory=256MiB", "audit.every=0"]


def untrained(seed=1):
    """A miniature in training attention whose scores, logits and importance all spread by some units."""
    model = build_model(TINY, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("importance.A"):
                p.normal_(2.0, 0.5, generator=generator)
            elif p.ndim > 1:
                p.normal_(0.0, 0.25, generator=generator)
    return model.eval()


def without_heads(model):
    """The model that is served: the same weights, and heads that come from elsewhere."""
    served = copy.deepcopy(model)
    for layer in served.model.layers:
        del layer.self_attn.importance
    served.set_attn_implementation("eager")
    return served.to(DEVICE)


def config_of(model, folder, geometry):
    """Save the heads and return the configuration that serves them in this geometry."""
    info = HeadsInfo.of(layer_specs(model.config), model_type="llama", method="nosa", provenance="random")
    save_heads(folder / "heads.safetensors", importance_tensors(model.state_dict()), info)
    return RheoConfig.from_dict(
        {
            "cache": {"block_size": geometry.block_size},
            "selection": {
                "method": "nosa",
                "token_budget": geometry.tokens,
                "sink_blocks": geometry.sink,
                "recent_blocks": geometry.recent,
                "query_agnostic_share": geometry.share,
                "params": {"weights": str(folder / "heads.safetensors"), "window_stride": geometry.unit},
            },
            "prefill": {"chunk_tokens": 96},
        }
    ).with_overrides(TIGHT)


@torch.no_grad()
def trained_logits(model, ids, context, geometry, *, bias=True):
    """Logits [rows, vocabulary] of every token behind the context, in training attention."""
    native = Pass(context_tokens=context, geometry=geometry, bias=bias)
    return model.lm_head(model.model(input_ids=ids, native=native, use_cache=False).last_hidden_state)[
        0, context:
    ]


@torch.no_grad()
def served_logits(model, ids, context):
    """The same, one decode step after the other."""
    cache = model.rheo.new_cache(max_length=ids.shape[1])
    model.rheo.prefill(cache, ids[:, :context])
    steps = [model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in ids[0, context:]]
    cache.executor.cache.check_integrity()
    return torch.stack(steps)


def check_served_as_trained(trained, served, ids, context, geometry):
    """The same logits by the tolerance rule; neither dense attention nor one without the bias would give them."""
    trained.to(DEVICE)
    ids = ids.to(DEVICE)
    got = served_logits(served, ids, context)
    plain = trained_logits(trained, ids, context, geometry)
    others = [
        trained_logits(trained, ids, context, None),
        trained_logits(trained, ids, context, geometry, bias=False),
    ]
    truth = trained_logits(trained.double(), ids, context, geometry)
    assert_close(got, truth, plain, torch.float32)
    assert all(relative_error(other, truth) > 1e-2 for other in others)
    stats = served.rheo.stats()
    assert stats.decode_steps == len(truth) and stats.evicted_blocks > 0 and stats.miss_blocks > 0


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32])
def test_a_decode_step_is_the_attention_of_training(tmp_path, block_size, stride):
    """Teacher-forced over the borders of blocks and windows, more than four budgets of context."""
    geometry = Geometry(block_size=block_size, unit=stride, budget=7, sink=1, recent=2, agnostic=2)
    context = 4 * geometry.tokens + 13
    trained = untrained()
    ids = torch.randint(
        5, trained.config.vocab_size, (1, context + STEPS), generator=torch.Generator().manual_seed(2)
    )
    served = offload(without_heads(trained), config_of(trained, tmp_path, geometry))
    check_served_as_trained(trained, served, ids, context, geometry)


def packaged():
    """The packaged model in training attention, with its heads."""
    model = build_model(Recipe(), seed=0)
    model.load_state_dict(read_weights(loader.NATIVE_DIR / "model.safetensors"), strict=False)
    for i, tensors in read_heads(loader.NATIVE_DIR / "heads.safetensors").layers.items():
        named = {name.removeprefix("self_attn."): tensor for name, tensor in tensors.items()}
        model.model.layers[i].self_attn.importance.load_state_dict(named)
    return model.eval()


def results():
    return json.loads((loader.NATIVE_DIR / "results.json").read_text())


def packaged_geometry():
    found = results()
    return Geometry(
        block_size=found["block_size"],
        unit=found["window_stride"],
        budget=found["budget_tokens"] // found["block_size"],
        sink=found["sink_blocks"],
        recent=found["recent_blocks"],
        agnostic=found["query_agnostic_blocks"],
    )


def conversation(tokens, question_tokens, seed=6_000_000):
    """An unseen context with its questions: layout and ids [1, tokens]."""
    return draw_sequence(tokens, question_tokens, seed + tokens)


def served_native():
    model, _ = loader.load("native", dtype="float32", device=DEVICE)
    return offload(model, loader.own_config("native").with_overrides(TIGHT))


def test_the_packaged_model_is_served_as_it_was_trained():
    """Its files, its geometry, questions and answers behind four budgets of context."""
    layout, ids = conversation(2304, 160)
    ids = ids[:, : layout.context_tokens + STEPS]
    assert layout.context_tokens >= 4 * results()["budget_tokens"]
    check_served_as_trained(packaged(), served_native(), ids, layout.context_tokens, packaged_geometry())


def test_the_packaged_results_name_the_geometry_of_the_packaged_configuration():
    found, config = results(), loader.own_config("native")
    selection, size = config.selection, config.cache.block_size
    policy = make_policy(
        selector=make_selector("nosa", selection.params, block_size=size),
        block_budget=selection.token_budget // size,
        sink_blocks=selection.sink_blocks,
        recent_blocks=selection.recent_blocks,
        query_agnostic_share=selection.query_agnostic_share,
        heat_decay=selection.heat_decay,
    )
    assert (found["trained"], found["block_size"], found["budget_tokens"]) == (
        selection.method,
        size,
        selection.token_budget,
    )
    assert found["window_stride"] == selection.params["window_stride"]
    geometry = packaged_geometry()
    assert (geometry.sink, geometry.recent) == (policy.sink_blocks, policy.recent_blocks)
    assert (geometry.query, geometry.agnostic) == (policy.query_blocks, policy.agnostic_blocks)
    assert found["query_agnostic_share"] == selection.query_agnostic_share == round(geometry.share, 4)


def test_the_engine_gives_the_answers_that_one_conversation_gives():
    """Two conversations of different lengths; their first and last questions are asked again, two at a time."""
    model = served_native()
    prompts, expected = [], []
    for tokens in (1024, 2048):
        layout, ids = conversation(tokens, 60)
        said = ids[0, : layout.context_tokens].tolist()
        turns = []
        for question, answer in ask(model, ids, layout):
            said += ids[0, question.start - 1 : question.start + 1].tolist()
            turns.append((list(said), answer))
            said += answer
        for turn in (turns[0], turns[-1]):
            prompts.append(turn[0])
            expected.append(turn[1])
    with Engine(model, max_rows=2, max_context_tokens=2100) as engine:
        got = engine.generate(prompts, SamplingParams(max_new_tokens=8))
        stats = engine.stats()
    assert got == expected and all(len(answer) >= 2 for answer in got)
    assert stats.evicted_blocks > 0 and stats.miss_blocks > 0
