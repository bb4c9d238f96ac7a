"""Steps that break: while they are captured, while they are replayed, and for good. What is said, and what goes on."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rheo_offload.engine.engine import Engine
from rheo_offload.engine.request import State
from rheo_offload.errors import EngineError, GraphError
from rheo_offload.execution import graph
from rheo_offload.execution.executor import Executor
from rheo_offload.execution.graph import GraphRunner
from tests.engine.test_engine import alone, ids_of, params, tight_model

NO_MEMORY = "no device memory left to capture it; lower cache.device_memory or the batch"


@pytest.fixture
def captures_break(monkeypatch):
    """Let a runner believe in graphs, on the CPU too, none of which can be captured."""

    @contextmanager
    def capture(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(graph, "is_cuda", lambda device: True)
    monkeypatch.setattr(graph, "capture_stream", lambda device: None)
    monkeypatch.setattr(graph, "mend_torch", lambda device, pool: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def test_an_engine_that_cannot_capture_answers_all_the_same(captures_break, caplog):
    model = tight_model()
    prompts = [ids_of(40, seed=s) for s in (1, 2)]
    told = []
    with Engine(
        model, max_rows=2, max_context_tokens=128, on_capture=lambda rows, what: told.append((rows, what))
    ) as engine:
        got = engine.generate(prompts, params(8))
        assert engine.generate(prompts[:1], params(8)) == got[:1]
        runner = engine.stepper.runner
        assert not runner.captured and runner.why_eager(2, "greedy") == NO_MEMORY
        with pytest.raises(GraphError, match="3 rows .* largest batch bucket, 2"):
            runner.bucket_of(3)
    assert got == [alone(model, ids, 8) for ids in prompts]
    assert (2, NO_MEMORY) in told and f"batch of 2 runs eagerly: {NO_MEMORY}" in caplog.text


def waits_for_the_device():
    return torch.ones((), device="cuda").item()


def finds_no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("breaks", "why"),
    [
        pytest.param(waits_for_the_device, "the step cannot be captured: ", id="waits"),
        pytest.param(finds_no_memory, NO_MEMORY, id="memory"),
    ],
)
def test_a_capture_that_breaks_half_way(breaks, why, monkeypatch, caplog):
    """Steps of two rows break while they are captured, with work under way on a stream that does not come back.

    1. two rows run eagerly, and a log line says why. 2. one row alone is captured. 3. torch is what it was before.
    """
    model = tight_model()
    prompts = [ids_of(40, seed=s) for s in (1, 2)]
    expected = [alone(model, ids, 20) for ids in prompts]
    forward, stream, side = Executor.forward, torch.cuda.current_stream(), torch.cuda.Stream()

    def broken_forward(self, layer, call):
        if layer == 1 and len(call.q) == 2 and torch.cuda.is_current_stream_capturing():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call.q.clone()
            breaks()
        return forward(self, layer, call)

    monkeypatch.setattr(Executor, "forward", broken_forward)
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        assert engine.generate(prompts, params(20)) == expected
        reason = engine.stepper.runner.why_eager(2, "greedy")
        assert reason.startswith(why) and "previous error" not in reason
        assert f"batch of 2 runs eagerly: {reason}" in caplog.text
        assert engine.generate(prompts[:1], params(20)) == expected[:1]
        assert engine.stepper.runner.captured == [(1, "greedy")]
        engine._kv.check_integrity()
    assert torch.cuda.current_stream() == stream
    assert torch.isfinite(torch.randn(4, device="cuda")).all(), "the generator is not waiting for a capture"
    spare = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    del spare
    reserved = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved - (64 << 20), "what is cached is given back"
    assert alone(model, prompts[0], 20) == expected[0]


@pytest.mark.gpu
def test_ctrl_c_while_a_step_is_captured():
    """It is heard, by `generate` and by an engine, and what comes next is as if nothing had happened."""
    model = tight_model()
    ids = ids_of(40)
    expected = alone(model, ids, 20)

    def interrupt(*args):
        if torch.cuda.is_current_stream_capturing():
            raise KeyboardInterrupt

    with Engine(model, max_rows=1, max_context_tokens=128) as engine:
        with model.model.layers[1].register_forward_pre_hook(interrupt):
            with pytest.raises(KeyboardInterrupt):
                alone(model, ids, 20)
            request = engine.submit(ids, params(20), request_id="cut")
            with pytest.raises(KeyboardInterrupt):
                engine.run()
        with pytest.raises(EngineError, match="KeyboardInterrupt.*'cut'"):
            engine.step()
        assert request.state is State.FAILED
        assert engine.generate([ids], params(20)) == [expected] and engine.stepper.runner.captured
    assert alone(model, ids, 20) == expected and torch.isfinite(torch.randn(4, device="cuda")).all()


@pytest.mark.gpu
def test_a_replay_that_fails_fails_its_requests_and_the_engine_goes_on(monkeypatch):
    """1. two requests run from a graph, one waits. 2. the replay fails. 3. the third is answered, from a new graph."""
    model = tight_model()
    with Engine(model, max_rows=2, max_context_tokens=128) as engine:
        ran = [engine.submit(ids_of(40, seed=s), params(60), request_id=f"r{s}") for s in (1, 2)]
        waits = engine.submit(ids_of(40, seed=7), params(12), request_id="waits")
        while (2, "greedy") not in engine.stepper.runner.captured:
            engine.step()

        def fail(self):
            raise RuntimeError("CUDA error: an illegal instruction was encountered")

        with monkeypatch.context() as broken:
            broken.setattr(torch.cuda.CUDAGraph, "replay", fail)
            with pytest.raises(EngineError, match="illegal instruction.*'r1', 'r2'.*1 waiting"):
                engine.step()
        assert all(r.state is State.FAILED and "illegal" in str(r.error) for r in ran)
        engine.run()
        assert engine.stepper.runner.captured
        assert waits.output_ids == alone(model, ids_of(40, seed=7), 12)


def test_a_batch_without_device_memory_fails_once_and_fewer_rows_go_on(monkeypatch, caplog):
    """1. the third row makes a step too large. 2. it has failed, and who waited is answered two at a time."""
    model = tight_model()
    run = GraphRunner.run

    def limited(self, step, rows, *args, **kwargs):
        if rows > 2:
            finds_no_memory()
        return run(self, step, rows, *args, **kwargs)

    monkeypatch.setattr(GraphRunner, "run", limited)
    prompts = [ids_of(20, seed=s) for s in range(7)]
    with Engine(model, max_rows=4, max_context_tokens=64) as engine:
        requests = [engine.submit(ids, params(5)) for ids in prompts]
        with pytest.raises(
            EngineError, match=r"out of memory.*goes on with at most 2 row\(s\) with 3 waiting"
        ):
            engine.run()
        engine.run()
        assert [r.state for r in requests] == [State.FAILED] * 4 + [State.FINISHED] * 3
        assert engine.max_rows == engine._kv.rows == 2 and "at most 2 rows" in caplog.text
    assert [r.output_ids for r in requests[4:]] == [alone(model, ids, 5) for ids in prompts[4:]]


def test_a_device_that_is_lost_is_said_to_be(monkeypatch):
    """Nothing can be waited for or allocated any more: everybody has failed, and closing the engine is no error."""
    model = tight_model()
    with Engine(model, max_rows=1, max_context_tokens=128) as engine:
        ran = engine.submit(ids_of(40), params(30), request_id="ran")
        waits = engine.submit(ids_of(20), params(4), request_id="waits")
        for _ in range(4):
            engine.step()

        def lost(*args, **kwargs):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

        monkeypatch.setattr(GraphRunner, "run", lost)
        monkeypatch.setattr(GraphRunner, "close", lost)
        with pytest.raises(EngineError, match=r"ran: 'ran'; .*encountered; restart the process$"):
            engine.step()
        assert ran.state is waits.state is State.FAILED
        for use in (engine.step, lambda: engine.submit(ids_of(4))):
            with pytest.raises(EngineError, match="restart the process"):
                use()


ILLEGAL_ACCESS = """
import os
from rheo_offload import Engine, EngineError
from tests.engine.test_engine import ids_of, params, tight_model

engine = Engine(tight_model(), max_rows=2, max_context_tokens=128)
with engine:
    requests = [engine.submit(ids_of(n), params(60), request_id=f"r{n}") for n in (40, 50, 60)]
    while (2, "greedy") not in engine.stepper.runner.captured:
        engine.step()
    engine._kv.full[0].slot_of.fill_(1 << 30)
    try:
        engine.run()
    except EngineError as error:
        print(error)
print([r.state.value for r in requests], flush=True)
os._exit(0)  # without freeing anything on the device that is lost
"""


@pytest.mark.gpu
def test_an_illegal_access_in_a_replay_is_an_engine_error():
    """In a process of its own: no other CUDA call works in it afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", ILLEGAL_ACCESS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    message, states = done.stdout.splitlines()[-2:]
    assert (
        "CUDA error" in message and "'r40', 'r50'" in message
    )  # what kind depends on where the address points
    assert message.endswith("restart the process") and states == str(["failed"] * 3)
