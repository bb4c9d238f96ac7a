"""Scripted decoding: the decode path, token by token, agrees with the stock model where nothing is left out."""

import pytest
import torch

from rheo_offload import RheoConfig, offload
from rheo_offload.errors import NonFiniteError
from rheo_offload.eval.script import FREE, ScriptedSampler, decode_script, dense_script, script_of

PROMPT, FREE_TOKENS = 130, 6


@pytest.fixture
def script(source):
    return script_of(torch.tensor([source.prose(PROMPT)]), FREE_TOKENS)


def offloaded(model, budget: int):
    config = RheoConfig().with_overrides(
        [f"selection.token_budget={budget}", "cache.block_size=16", "cache.device_memory=floor"]
    )
    return offload(model, config)


def test_the_stock_model_continues_as_its_own_generate(model, script):
    ids = script[None, :PROMPT]
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=FREE_TOKENS, do_sample=False
    )[0]
    run = dense_script(model, script, start=100)
    assert run.tokens[:-FREE_TOKENS].tolist() == script[101:PROMPT].tolist()
    assert run.tokens[-FREE_TOKENS:].tolist() == want[PROMPT:].tolist()
    logprobs = model(want[None]).logits[0].log_softmax(-1)
    taken = logprobs[100:-1].gather(1, want[101:, None])[:, 0]
    torch.testing.assert_close(run.logprobs, taken, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", [1, 63, 129])
def test_everything_attended_is_the_stock_model(model, script, start):
    dense = dense_script(model, script, start=start, keep_distributions=True)
    run = decode_script(offloaded(model, 512), script, start=start, reference=dense.distributions)
    assert torch.equal(run.tokens, dense.tokens) and torch.equal(run.likeliest, dense.likeliest)
    torch.testing.assert_close(run.logprobs, dense.logprobs, atol=1e-3, rtol=1e-4)
    assert run.divergences.shape == (len(script) - start - 1,)
    assert run.divergences.abs().max() < 1e-4
    assert run.stats.decode_steps == len(script) - start - 1


def test_a_small_budget_diverges_and_moves_blocks(model, script):
    dense = dense_script(model, script, start=64, keep_distributions=True)
    run = decode_script(offloaded(model, 48), script, start=64, reference=dense.distributions)
    assert run.divergences.mean() > 0.01
    assert run.stats.evicted_blocks > 0 and run.stats.miss_blocks > 0
    assert model.rheo._caches is not None and all(cache._closed for cache in model.rheo._caches)


def test_the_sampler_forces_notes_and_measures():
    sampler = ScriptedSampler(
        torch.tensor([5, FREE, 2]),
        torch.device("cpu"),
        torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0]]), -1),
    )
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert sampler(logits, torch.tensor([1]), greedy=True).tolist() == [1]
    assert sampler(logits, torch.tensor([2]), greedy=True).tolist() == [2]
    assert sampler.tokens.tolist() == [FREE, 1, 2] and sampler.likeliest.tolist() == [FREE, 1, 1]
    p, q = torch.tensor([0.0, 1.0, 2.0]).double().softmax(0), logits[0].double().softmax(0)
    torch.testing.assert_close(
        sampler.divergences[2].double(), (p * (p / q).log()).sum(), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(sampler.logprobs[2].double(), q[2].log(), atol=1e-6, rtol=1e-6)
    assert not sampler.bad.any()
    sampler(torch.full((1, 3), torch.nan), torch.tensor([2]), greedy=True)
    assert sampler.bad.all()


def test_bad_logits_are_refused(model, script):
    offloaded(model, 512)
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(NonFiniteError):
        decode_script(model, script, start=120)


def test_a_script_without_room_is_refused(model, script):
    offloaded(model, 512)
    for start in (0, len(script) - 1, PROMPT):
        with pytest.raises(ValueError, match="cannot start"):
            decode_script(model, script, start=start)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["auto", "off"])
def test_captured_steps_measure_what_eager_ones_do(model, script, graph):
    model = model.to("cuda")
    dense = dense_script(model, script, start=20, keep_distributions=True)
    config = RheoConfig().with_overrides(
        ["selection.token_budget=512", "cache.block_size=16", "audit.every=0", f"execution.graph={graph}"]
    )
    run = decode_script(offload(model, config), script, start=20, reference=dense.distributions)
    assert torch.equal(run.tokens[:-FREE_TOKENS], dense.tokens[:-FREE_TOKENS])
    torch.testing.assert_close(
        run.logprobs[:-FREE_TOKENS], dense.logprobs[:-FREE_TOKENS], atol=2e-2, rtol=1e-2
    )
    assert run.divergences[:-FREE_TOKENS].max() < 1e-3


def test_a_run_ends_where_it_is_told_to(model, script):
    offloaded(model, 512)
    seen = []
    run = decode_script(model, script, start=120, stop=lambda token: seen.append(token) or len(seen) == 12)
    assert len(run.tokens) == len(run.likeliest) == len(run.logprobs) == 12 and run.tokens.tolist() == seen
    assert run.tokens[:9].tolist() == script[121:PROMPT].tolist()
