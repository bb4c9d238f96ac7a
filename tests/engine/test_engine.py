"""Requests join, stream and leave; each gets what it would have got alone, whatever the others do."""

import random

import psutil
import pytest
import torch

from rheo_offload import offload
from rheo_offload.engine.engine import Engine, stream
from rheo_offload.engine.request import State
from rheo_offload.errors import EngineError, NonFiniteError, RequestError
from rheo_offload.execution.graph import GraphRunner
from rheo_offload.execution.sampler import SamplingParams
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import BLOCK, greedy, prompt, sparse_config

# no slack and no heat: blocks are evicted and loaded all the time
TIGHT = dict(audit={"every": 0}, cache={"capacity_ratio": 1.0}, selection={"query_agnostic_share": 0.0})


def tight_model(family="llama", **kwargs):
    return offload(tiny_model(family, device=DEVICE), sparse_config(**{**TIGHT, **kwargs}))


def ids_of(n, seed=3):
    return prompt(n, seed=seed)[0].cpu()


def alone(model, ids, new):
    """What `generate` gives for one prompt, without end tokens."""
    options = dict(new=new, eos_token_id=None)
    return greedy(model, ids[None].to(DEVICE), **options)[0, len(ids) :].tolist()


def params(new, **kwargs):
    return SamplingParams(max_new_tokens=new, ignore_eos=True, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_random_schedule_gives_every_request_what_it_gets_alone(family):
    """Requests of all lengths join at random, some are cancelled; blocks are dropped at random between steps."""
    model = tight_model(family)
    rng = random.Random(5)
    wanted = [(rng.choice([1, 2, 30, 90, 170]), rng.randint(1, 24)) for _ in range(9)]
    prompts = [ids_of(n, seed=20 + i) for i, (n, _) in enumerate(wanted)]
    expected = [alone(model, ids, new) for ids, (_, new) in zip(prompts, wanted, strict=True)]
    with Engine(model, max_rows=4, max_context_tokens=256) as engine:
        requests = []
        cancelled = set()
        while len(requests) < len(prompts) or not engine.is_idle:
            if len(requests) < len(prompts) and rng.random() < 0.4:
                i = len(requests)
                requests.append(engine.submit(prompts[i], params(wanted[i][1])))
            if requests and rng.random() < 0.02:
                victim = rng.choice(requests)
                if not victim.is_done and engine.cancel(victim.id):
                    cancelled.add(victim)
            if rng.random() < 0.2:
                engine._kv.drop_blocks(0.5)
            engine.step()
            engine.scheduler.check_integrity()
        for request, tokens in zip(requests, expected, strict=True):
            if request in cancelled:
                assert request.output_ids == tokens[: len(request.output_ids)]
            else:
                assert request.output_ids == tokens and request.finish_reason == "length"
        engine._kv.check_integrity()
        stats = engine.stats()
        assert stats.evicted_blocks > 0 and stats.h2d_bytes > 0
        assert engine._kv.lengths == [0] * 4 and not any(engine._kv.pages)
    assert model.rheo._store.pages_in_use == 0


def test_one_request_owns_every_slot_in_the_end():
    """Three requests share the pool; the two short ones leave; the long one moves down and gets all slots."""
    model = tight_model()
    ids = ids_of(170)
    expected = alone(model, ids, 80)
    with Engine(model, max_rows=4, max_context_tokens=300) as engine:
        shorts = [engine.submit(ids_of(20, seed=s), params(3)) for s in (1, 2)]
        long = engine.submit(ids, params(80))
        while not all(r.is_done for r in shorts):
            engine.step()
        assert long.row == 2 or long.row == 0
        while not long.is_done:
            engine.step()
            if long.state is State.RUNNING and engine.steps > 60:
                assert long.row == 0 and engine._kv.sharing_rows == 1
                assert engine._kv.capacity >= engine._kv.blocks_of(len(ids))
        assert long.output_ids == expected


def test_tokens_stream_in_order_and_stop_tokens_end():
    model = tight_model()
    ids = ids_of(60)
    free = alone(model, ids, 12)
    stop = free[5]
    first = free.index(stop)
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        heard = []
        other = engine.submit(ids_of(40, seed=8), params(20))
        request = engine.submit(
            ids, params(12, stop_token_ids=(stop,)), on_token=lambda r, t: heard.append((r.id, t))
        )
        assert list(stream(engine, request)) == free[: first + 1]
        assert heard == [(request.id, t) for t in free[: first + 1]] and request.finish_reason == "stop"
        engine.run()
        assert other.output_ids == alone(model, ids_of(40, seed=8), 20)
        assert request.ttft_ms > 0 and other.itl_ms > 0


def test_more_requests_than_rows_wait_their_turn():
    model = tight_model()
    prompts = [ids_of(20 + i, seed=i) for i in range(5)]
    with Engine(model, max_rows=2, max_context_tokens=64) as engine:
        assert engine.generate(prompts, params(6)) == [alone(model, ids, 6) for ids in prompts]


def test_the_bytes_written_through_are_those_of_the_tokens():
    """The step behind a request's last one, which the host launches before it knows, writes nothing."""
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        engine.generate([ids_of(40), ids_of(20), ids_of(1)], params(6))
        tokens = (39 + 6) + (19 + 6) + 6
        assert engine.stats().d2h_bytes == tokens * 2 * 2 * 2 * 16 * 4  # layers x (K, V) x heads x D x 4


def test_draws_do_not_depend_on_the_company():
    model = tight_model()
    how = params(10, temperature=0.8, top_k=20, top_p=0.9, seed=4)
    ids = ids_of(50)
    with Engine(model, max_rows=4, max_context_tokens=128) as engine:
        by_itself = engine.generate([ids], how)[0]
        others = [engine.submit(ids_of(30 + i, seed=i), params(14, temperature=1.0)) for i in range(3)]
        request = engine.submit(ids, how)
        engine.run()
        assert request.output_ids == by_itself and all(r.is_done for r in others)


def test_a_step_that_fails_names_its_requests_and_the_engine_goes_on(monkeypatch):
    """1. two requests run, one waits. 2. a step fails once. 3. the two have failed, the third is answered."""
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        ran = [engine.submit(ids_of(40, seed=s), params(30), request_id=f"r{s}") for s in (1, 2)]
        waits = engine.submit(ids_of(40, seed=7), params(5), request_id="waits")
        for _ in range(6):
            engine.step()

        def fail(*args, **kwargs):
            raise RuntimeError("an illegal instruction was met")

        with monkeypatch.context() as broken:
            broken.setattr(GraphRunner, "run", fail)  # what a replay or a launch would raise
            with pytest.raises(EngineError, match="illegal instruction.*'r1', 'r2'.*1 waiting"):
                engine.step()
        assert all(r.state is State.FAILED and "illegal" in str(r.error) for r in ran)
        engine.run()
        assert waits.output_ids == alone(model, ids_of(40, seed=7), 5)


def test_a_row_with_bad_logits_fails_alone():
    """What spoils them is device data, so that a replayed step has it too."""
    model = tight_model()
    spoiled = torch.zeros(2, 1, 1, dtype=torch.bool, device=DEVICE)

    def spoil(module, args, output):
        return torch.where(spoiled[: len(output)], torch.nan, output)

    with (
        Engine(model, max_rows=2, max_context_tokens=128) as engine,
        model.lm_head.register_forward_hook(spoil),
    ):
        good = engine.submit(ids_of(40, seed=1), params(14))
        bad = engine.submit(ids_of(40, seed=2), params(14))
        while len(bad.output_ids) < 4:
            engine.step()
        assert engine.stepper.runner.captured == ([(2, "greedy")] if DEVICE == "cuda" else [])
        spoiled[bad.row] = True
        engine.run()
        assert isinstance(bad.error, NonFiniteError) and "new token" in str(bad.error)
        assert 4 <= len(bad.output_ids) < 14
    assert good.output_ids == alone(model, ids_of(40, seed=1), 14)


def test_what_can_never_run_is_refused_and_nothing_changes():
    model = tight_model()
    with pytest.raises(EngineError, match="512 positions"):
        Engine(model, max_rows=1, max_context_tokens=4096)
    with pytest.raises(EngineError, match="offload"):
        Engine(tiny_model("llama", device=DEVICE), max_rows=1, max_context_tokens=64)
    with Engine(model, max_rows=2, max_context_tokens=64) as engine:
        with pytest.raises(RequestError, match="max_new_tokens to 24"):
            engine.submit(ids_of(40), params(30))
        with pytest.raises(RequestError):
            engine.generate([ids_of(10), ids_of(64)], params(4))
        with pytest.raises(EngineError, match="stop tokens"):
            engine.submit(ids_of(10), params(4, stop_token_ids=tuple(range(40))))
        assert engine.is_idle and not engine.cancel("nobody")
    assert model.rheo._store.pages_in_use == 0


def test_a_closed_engine_says_so():
    engine = Engine(tight_model(), max_rows=1, max_context_tokens=64)
    engine.close()
    for use in (engine.step, lambda: engine.submit(ids_of(4)), lambda: engine.generate([ids_of(4)])):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_a_long_run_takes_no_more_memory():
    """Fifty requests through two rows: pages, tables and captures are the same in the end as after the first."""
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=3 * BLOCK) as engine:
        engine.generate([ids_of(BLOCK)], params(4))
        version, pages = engine._kv.version, model.rheo._store.bytes_usable
        for i in range(24):
            engine.generate([ids_of(BLOCK + i % 5, seed=i), ids_of(1 + i % 7, seed=i)], params(1 + i % 6))
        assert engine._kv.version == version and model.rheo._store.bytes_usable == pages
        assert model.rheo._store.pages_in_use == 0


@pytest.mark.gpu
def test_two_thousand_steps_take_no_more_memory_and_no_more_captures():
    """The same requests over and over: after the first time nothing is captured, and nothing grows."""
    model = tight_model()
    with Engine(model, max_rows=4, max_context_tokens=128) as engine:

        def waves():
            """One to four requests at once, greedy ones and then drawn ones, each wave until all have ended."""
            for wave in range(8):
                how = params(20 + wave % 3, temperature=0.8 * (wave // 4), seed=wave)
                for i in range(1 + wave % 4):
                    engine.submit(ids_of(20 + 9 * i, seed=i), how)
                engine.run()

        def captured():
            return engine.stepper.runner.captures, engine._kv.version

        waves()
        before, first = captured(), engine.steps
        device, host = torch.cuda.memory_allocated(), psutil.Process().memory_info().rss
        while engine.steps - first < 2000:
            waves()
        assert captured() == before and before[0] == 6, "three buckets, greedy and sampling"
        assert torch.cuda.memory_allocated() - device < 1 << 20
        assert psutil.Process().memory_info().rss - host < 16 << 20
