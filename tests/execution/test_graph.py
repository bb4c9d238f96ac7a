"""When a step is captured, replayed, captured anew or left eager. The graphs are stand-ins that record closures."""

from contextlib import contextmanager

import pytest
import torch

from rheo_offload.errors import GraphError
from rheo_offload.execution import graph as graph_module
from rheo_offload.execution.graph import EAGER_STEPS, GraphRunner, buckets_for


class FakeGraph:
    def __init__(self):
        self.calls = []

    def replay(self):
        for call in self.calls:
            call()


class Step:
    """A step that counts how often it really ran, and how often it was launched by the host."""

    def __init__(self):
        self.ran, self.launched, self.fail = [], [], None
        self.capturing = None
        self.stream, self.mended = "main", []

    def __call__(self, rows, variant):
        if self.fail is not None and self.capturing is not None:
            raise self.fail
        self.launched.append((rows, variant))
        if self.capturing is not None:
            self.capturing.calls.append(lambda: self.ran.append((rows, variant)))
        else:
            self.ran.append((rows, variant))


@pytest.fixture
def step(monkeypatch):
    step = Step()

    @contextmanager
    def capture(graph, **kwargs):
        before, step.stream = step.stream, kwargs["stream"]
        step.capturing = graph
        try:
            yield
        except BaseException as error:
            step.capturing = (
                None  # and the stream stays: torch leaves it behind, and says nothing about the cause
            )
            raise RuntimeError("operation failed due to a previous error during capture") from error
        step.capturing = None
        step.stream = before

    @contextmanager
    def on_stream(stream):
        before, step.stream = step.stream, stream
        try:
            yield
        finally:
            step.stream = before

    monkeypatch.setattr(graph_module, "is_cuda", lambda device: True)
    monkeypatch.setattr(graph_module, "current_stream", lambda device: step.stream)
    monkeypatch.setattr(graph_module, "on_stream", on_stream)
    monkeypatch.setattr(graph_module, "capture_stream", lambda device: "capture")
    monkeypatch.setattr(graph_module, "mend_torch", lambda device, pool: step.mended.append(pool))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    return step


def runner(rows=8, **kwargs):
    return GraphRunner(torch.device("cuda"), buckets_for(rows), **kwargs)


def test_buckets_are_powers_of_two_and_the_largest_batch():
    assert buckets_for(1) == (1,)
    assert buckets_for(6) == (1, 2, 4, 6)
    assert buckets_for(64) == (1, 2, 4, 8, 16, 32, 64)
    with pytest.raises(ValueError, match="at least one row"):
        buckets_for(0)


def test_every_run_is_one_step_and_after_the_capture_the_host_launches_nothing(step):
    graphs = runner()
    for _ in range(10):
        assert graphs.run(step, 3, version=1) == 4
    assert step.ran == [(4, None)] * 10
    assert len(step.launched) == EAGER_STEPS + 1, "eager steps, one capture, then replays"
    assert graphs.captures == 1 and graphs.captured == [(4, None)]


def test_buckets_and_variants_are_captured_when_they_are_first_used(step):
    graphs = runner()
    for rows, variant in [(1, "greedy"), (5, "greedy"), (1, "sampling"), (8, "greedy")]:
        for _ in range(4):
            graphs.run(step, rows, variant, version=1)
    assert sorted(graphs.captured) == [(1, "greedy"), (1, "sampling"), (8, "greedy")]


def test_new_tables_are_captured_anew(step):
    """1. captured. 2. the tables move: two eager steps, then a graph over the new ones."""
    graphs = runner()
    for _ in range(4):
        graphs.run(step, 8, version=1)
    before = len(step.launched)
    for _ in range(4):
        graphs.run(step, 8, version=2)
    assert len(step.launched) == before + EAGER_STEPS + 1 and graphs.captures == 2


def test_a_capture_without_memory_leaves_that_bucket_eager_and_says_so(step, caplog):
    told = []
    graphs = runner(on_capture=lambda rows, what: told.append((rows, what)))
    for _ in range(4):
        graphs.run(step, 2, version=1)
    step.fail = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(6):
        graphs.run(step, 8, version=1)
    assert step.ran[-6:] == [(8, None)] * 6 and graphs.captured == [(2, None)]
    assert "cache.device_memory" in graphs.why_eager(8) and graphs.why_eager(2) is None
    assert "batch of 8 runs eagerly" in caplog.text
    assert told[0] == (2, "capturing") and told[-1] == (8, graphs.why_eager(8))


def test_a_larger_bucket_that_was_captured_serves_a_smaller_batch_that_could_not_be(step):
    graphs = runner()
    for _ in range(4):
        graphs.run(step, 8, version=1)
    step.fail = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(4):
        graphs.run(step, 3, version=1)
    launched = len(step.launched)
    assert graphs.run(step, 3, version=1) == 8
    assert len(step.launched) == launched, "a replay"


def test_what_cannot_be_captured_runs_eagerly_with_the_reason(step):
    graphs = runner()
    step.fail = RuntimeError("operation not permitted when stream is capturing\nmore")
    for _ in range(5):
        graphs.run(step, 1, version=1)
    assert step.ran == [(1, None)] * 5
    assert (
        graphs.why_eager(1) == "the step cannot be captured: operation not permitted when stream is capturing"
    )


def test_a_capture_that_breaks_leaves_nothing_behind(step):
    """The stream is the old one, torch was told, and the next bucket is captured into memory of its own."""
    graphs = runner()
    step.fail = RuntimeError("operation not permitted when stream is capturing")
    for _ in range(4):
        graphs.run(step, 1, version=1)
    assert graphs.why_eager(1) and step.stream == "main"
    assert len(step.mended) == 1 and step.mended[0] is not graphs._pool
    step.fail = None
    for _ in range(4):
        graphs.run(step, 2, version=1)
    assert graphs.captured == [(2, None)] and len(step.mended) == 1


def test_ctrl_c_in_a_capture_is_not_taken_for_a_step_that_cannot_be_captured(step):
    graphs = runner()
    step.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(4):
            graphs.run(step, 1, version=1)
    assert step.stream == "main" and not graphs.captured


def test_an_error_without_a_message_is_a_reason_too(step):
    graphs = runner()
    step.fail = RuntimeError()
    for _ in range(4):
        graphs.run(step, 1, version=1)
    assert graphs.why_eager(1) == "the step cannot be captured: RuntimeError"


def test_a_step_may_be_eager_on_purpose(step):
    graphs = runner()
    for _ in range(4):
        graphs.run(step, 1, version=1)
    launched = len(step.launched)
    graphs.run(step, 1, version=1, eager=True)
    assert len(step.launched) == launched + 1 and len(step.ran) == 5
    off = runner(enabled=False)
    for _ in range(5):
        off.run(step, 1, version=1)
    assert not off.captured and off.why_eager(1) == "execution.graph is off"


def test_too_many_rows_are_refused_with_the_largest_that_fit(step):
    with pytest.raises(GraphError, match="9 rows .* largest batch bucket, 8"):
        runner().run(step, 9, version=1)
    assert not step.launched


@pytest.mark.parametrize(
    ("told", "calls"), [(False, ["end", "release", "capture"]), (True, ["end", "capture"])]
)
def test_torch_is_told_of_a_broken_capture_where_it_does_not_know(monkeypatch, told, calls):
    """The pool is given back only where torch forgot that: giving it back twice would take it from live graphs."""
    seen = []

    def end(device, pool):
        seen.append("end")
        if told:
            raise RuntimeError("not currently recording to mempool_id")

    @contextmanager
    def capture(graph, **kwargs):
        seen.append("capture")
        yield

    monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", end)
    monkeypatch.setattr(torch.cuda.memory, "_cuda_releasePool", lambda device, pool: seen.append("release"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graph_module.mend_torch(torch.device("cpu"), (0, 1))
    assert seen == calls
