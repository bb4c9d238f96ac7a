"""What once went wrong with many requests: each scenario is one that the random schedules did not meet."""

import traceback
import weakref

import pytest
import torch

from rheo_offload.engine.engine import Engine, stream
from rheo_offload.engine.request import State
from rheo_offload.errors import CacheError, EngineError, HostMemoryError, RequestError
from rheo_offload.execution import graph
from rheo_offload.execution.graph import GraphRunner
from rheo_offload.model.stepper import Stepper
from tests.engine.test_engine import alone, ids_of, params, tight_model
from tests.test_end_to_end import BLOCK, prompt


def test_two_streams_in_turn_lose_no_token():
    """While one stream waits for its reader, the other one steps the engine for both."""
    model = tight_model()
    prompts = [ids_of(40, seed=s) for s in (1, 2)]
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        one, other = (stream(engine, engine.submit(ids, params(10))) for ids in prompts)
        pairs = list(zip(one, other, strict=True))
    assert [list(tokens) for tokens in zip(*pairs, strict=True)] == [alone(model, ids, 10) for ids in prompts]


def test_an_interrupted_step_is_not_gone_on_from():
    """Ctrl-C between a step and the note that it ran: its token would be missing from the answer."""
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        ran = engine.submit(ids_of(40), params(20))
        waits = [engine.submit(ids_of(30, seed=s), params(4)) for s in (5, 6)]
        while len(ran.output_ids) < 3:
            engine.step()
        launch = Stepper.launch

        def interrupted(self, rows=None):
            launch(self, rows)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stepper, "launch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        with pytest.raises(EngineError, match="KeyboardInterrupt"):
            engine.step()
        assert ran.state is State.FAILED
        engine.run()
        assert waits[1].output_ids == alone(model, ids_of(30, seed=6), 4)


def test_a_failed_step_holds_no_pool(monkeypatch):
    """The error stays with its requests, but not what its frames hold: the next pool needs that memory."""
    monkeypatch.setattr(graph, "EAGER_STEPS", 100)  # every step is launched by the host, on a GPU too
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        request = engine.submit(ids_of(40), params(30))
        for _ in range(4):
            engine.step()
        pool = weakref.ref(engine._kv.full[0])
        opened = []
        open_again = engine._open
        monkeypatch.setattr(engine, "_open", lambda: (opened.append(pool()), open_again()))

        def fail(self, layer, *args):
            raise RuntimeError("an illegal instruction was met")

        with monkeypatch.context() as broken:
            broken.setattr(type(engine._ex), "selector_of", fail)
            with pytest.raises(EngineError, match="illegal"):
                engine.step()
        assert opened == [None], "the old pool was gone before the new one was allocated"
        assert "illegal" in "".join(traceback.format_exception(request.error)), "the error still says where"


def test_nothing_is_left_behind_when_generate_fails(monkeypatch):
    model = tight_model()
    with Engine(model, max_rows=1, max_context_tokens=128) as engine:

        def fail(*args, **kwargs):
            raise RuntimeError("an illegal instruction was met")

        with monkeypatch.context() as broken:
            broken.setattr(GraphRunner, "run", fail)
            with pytest.raises(EngineError, match="illegal"):
                engine.generate([ids_of(20, seed=s) for s in range(3)], params(4))
        assert engine.is_idle
        with pytest.raises(ValueError, match="prompt_ids"):
            engine.generate([ids_of(20), torch.zeros(2, 2, dtype=torch.int64)], params(4))
        assert engine.is_idle


def test_a_request_that_nothing_will_make_room_for_fails():
    """Another cache of the model takes the pages after the request was accepted: it must not be waited for forever."""
    model = tight_model(cache={"host_memory": "256KiB"})
    with Engine(model, max_rows=2, max_context_tokens=256) as engine:
        pages = model.rheo._store.pages_free
        tokens = min(256, pages * BLOCK) - BLOCK
        big = engine.submit(ids_of(tokens - 4), params(4))
        hog = model.rheo.new_cache(max_length=300)
        model.rheo.prefill(hog, prompt(250))
        small = engine.submit(ids_of(4), params(2))
        engine.run()
        assert isinstance(big.error, HostMemoryError) and "other caches" in str(big.error)
        assert small.output_ids == alone(model, ids_of(4), 2)
        hog.close()


def test_tokens_that_the_model_does_not_have_are_refused_at_once():
    """On a GPU such a token ends the process, with everybody's requests."""
    model = tight_model()
    with Engine(model, max_rows=1, max_context_tokens=64) as engine:
        for bad in (97, -1):
            with pytest.raises(RequestError, match=f"token {bad}.*97"):
                engine.submit([5, bad, 7], params(4))
        assert engine.is_idle


def test_figures_after_starting_over(monkeypatch):
    """Requests that waited while the engine started over are in the figures; those that failed are not."""
    model = tight_model()
    with Engine(model, max_rows=1, max_context_tokens=128) as engine:
        engine.submit(ids_of(40), params(4))
        engine.submit(ids_of(30), params(6))

        def fail(*args, **kwargs):
            raise RuntimeError("an illegal instruction was met")

        with monkeypatch.context() as broken:
            broken.setattr(GraphRunner, "run", fail)
            with pytest.raises(EngineError):
                engine.run()
        engine.run()
        stats = engine.stats()
        assert (stats.prompt_tokens, stats.new_tokens) == (30, 6)
        assert engine.cache.clock.rows == 1


def test_a_request_without_memory_behind_its_pages_fails_alone(monkeypatch):
    """The store's address range has pages, the machine no memory for them: only who needs them learns of it."""
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        runs = engine.submit(ids_of(40), params(12))
        for _ in range(4):
            engine.step()
        reserve = engine._kv.reserve

        def short(tokens):
            if tokens[1]:
                raise HostMemoryError("no memory left")
            reserve(tokens)

        monkeypatch.setattr(engine._kv, "reserve", short)
        late = engine.submit(ids_of(50), params(4))
        engine.run()
        assert late.state is State.FAILED and isinstance(late.error, HostMemoryError)
        assert runs.output_ids == alone(model, ids_of(40), 12)


def test_a_dense_layer_that_fits_its_pool_only_now_is_another_step():
    """Whether a dense layer is read in rounds is decided by the host: a captured step must not outlive it."""
    steps = {}
    for dense in ([], [1]):
        model = tight_model(selection={"query_agnostic_share": 0.0, "dense_layers": dense})
        with Engine(model, max_rows=4, max_context_tokens=256) as engine:
            ex, seen = engine._ex, []
            for rows in (4, 1, 4):
                engine._kv.share_slots(rows)
                seen.append((ex.version, ex.is_streamed(engine._kv.full[1])))
            steps[len(dense)] = seen
    assert [streamed for _, streamed in steps[1]] == [True, False, True]
    assert steps[1][0][0] == steps[1][2][0] != steps[1][1][0]
    assert len({version for version, _ in steps[0]}) == 1, "without dense layers nothing is captured anew"


def test_scratch_follows_tables_that_grew():
    """The tables grow behind the executor's back: scratch of the old size would be written out of bounds."""
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=64) as engine:
        request = engine.submit(ids_of(40), params(20))
        for _ in range(4):
            engine.step()
        engine._kv.grow(12, engine._kv.capacity)
        engine.run()
        ws = engine._ex.workspace_of(engine._kv.full[0].view(slice(0, 1)))
        assert ws.block_scores.shape[2] == 12
        assert request.output_ids == alone(model, ids_of(40), 20)


def test_an_engine_over_a_model_with_other_attention_answers_nothing():
    """Starting over does not help, and must not look as if it did: foreign attention sees a chunk's own tokens only."""
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        engine.submit(ids_of(60), params(10))
        for _ in range(4):
            engine.step()
        model.set_attn_implementation("eager")
        with pytest.raises(EngineError, match=r"restore\(\)"):
            engine.run()
        late = [engine.submit(ids_of(n), params(10)) for n in (60, 1)]
        with pytest.raises(EngineError, match=r"restore\(\)"):
            engine.run()
        assert [r.output_ids for r in late] == [[], []]
    with pytest.raises(CacheError, match="'eager'"):
        alone(model, ids_of(60), 4)


def test_a_callback_that_raises_fails_its_own_request():
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:

        def broken_pipe(request, token):
            if len(request.output_ids) == 3:
                raise OSError("the reader has gone")

        gone = engine.submit(ids_of(40, seed=1), params(10), on_token=broken_pipe)
        stays = engine.submit(ids_of(40, seed=2), params(10))
        engine.run()
        assert gone.state is State.FAILED and "reader" in str(gone.error) and len(gone.output_ids) == 3
        assert stays.output_ids == alone(model, ids_of(40, seed=2), 10)


def test_a_prompt_is_what_it_was_when_it_was_submitted():
    model = tight_model()
    with Engine(model, max_rows=1, max_context_tokens=128) as engine:
        buffer = ids_of(40).clone()
        request = engine.submit(buffer, params(5))
        buffer.fill_(9)
        engine.run()
        assert request.output_ids == alone(model, ids_of(40), 5)
