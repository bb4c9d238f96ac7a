"""A decode step is decided on the device: what a step launches can be recorded once and replayed.

On the CPU the step is recorded as the list of kernel calls and replayed with nothing changed but the contents of
the buffers, which is what a captured CUDA graph does; on a GPU it is captured for real.
"""

import copy
from types import SimpleNamespace

import pytest
import torch

from rheo_offload import offload
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import FAMILIES, tiny_model
from tests.model.test_families import batch
from tests.test_end_to_end import METHODS, sparse_config

STEPS = 40  # crosses block boundaries (claims, evictions) and the fill of the sliding windows


def step_logits(model, cache, ids, positions):
    with torch.no_grad():
        return model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            attention_mask=None,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def prefilled(model, lengths=(150, 70)):
    """A cache with a prompt in it whose host pages reach beyond what the test will write."""
    ids, mask = batch(lengths)
    cache = model.rheo.new_cache(max_length=lengths[0] + STEPS + 8)
    model.rheo.prefill(cache, ids.to(model.device), mask.to(model.device))
    return cache


def tokens_for(step, rows):
    return torch.randint(3, 97, (rows, 1), generator=torch.Generator().manual_seed(step)).to(DEVICE)


class Recorder:
    """Wraps the ops: runs them and, while recording, notes every call with the very tensors it got."""

    def __init__(self, ops):
        self.calls, self.recording = [], False
        for name, op in vars(ops).items():
            setattr(self, name, self._wrap(op))

    def _wrap(self, op):
        def call(*args, **kwargs):
            if self.recording:
                self.calls.append((op, args, kwargs))
            return op(*args, **kwargs)

        return call


class RecordedSelector:
    """Notes a method's `score`, with whatever it does besides calling ops, as one call."""

    def __init__(self, inner, recorder, ops):
        self.inner, self.ops, self.note = inner, ops, recorder._wrap(inner.score)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def score(self, ops, *args, **kwargs):
        self.note(self.ops, *args, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_recorded_layer_replays(method):
    """Record one step of both layers, then replay the calls with new q, k, v and clocks: equal to the eager twin."""
    model = offload(tiny_model("llama"), sparse_config(method, audit={"every": 0}))
    eager, recorded = prefilled(model), prefilled(model)
    ex = recorded.executor
    recorder = Recorder(ex.ops)
    ex.selector = RecordedSelector(ex.selector, recorder, ex.ops)
    ex.ops = recorder
    rows = ex.cache.rows
    calls = [
        SimpleNamespace(
            q=torch.zeros(rows, 4, 1, 16), k=torch.zeros(rows, 2, 1, 16), v=torch.zeros(rows, 2, 1, 16)
        )
        for _ in range(2)
    ]
    outputs = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for call in calls:
            for t in vars(call).values():
                t.copy_(torch.randn(t.shape, generator=generator))
        eager.executor.begin_decode()
        truth = [eager.executor.forward(i, attention_call(copy.deepcopy(c))) for i, c in enumerate(calls)]
        if step == 0:
            recorder.recording = True
            ex.begin_decode()
            outputs = [ex.forward(i, attention_call(c)) for i, c in enumerate(calls)]
            recorder.recording = False
        else:
            ex.cache.before_decode()  # the host's part
            ex.cache.after_decode()
            ex.begin_decode_on_device(rows)
            for op, args, kwargs in recorder.calls:
                op(*args, **kwargs)
        for i in range(2):
            assert torch.equal(outputs[i], truth[i]), f"step {step}, layer {i}"
    ex.cache.check_integrity()
    rounds = 2 * len(ex.rounds_workspace_of(ex.cache.full[0]).firsts)
    assert len(recorder.calls) <= 2 * (8 if method != "full" else 2 + rounds), (
        "at most eight launches a layer"
    )


def attention_call(c):
    from rheo_offload.types import AttentionCall

    return AttentionCall(c.q, c.k, c.v, 0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_step_equals_eager(family):
    """One decode step of the unchanged model in a CUDA graph, PCIe gather included, replayed across evictions."""
    model = tiny_model(family, device=DEVICE)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    # no slack and no heat: the selection moves, so that blocks are evicted and loaded in every family
    tight = sparse_config(
        audit={"every": 0}, cache={"capacity_ratio": 1.0}, selection={"query_agnostic_share": 0.0}
    )
    offload(model, tight)
    eager, captured = prefilled(model), prefilled(model)
    rows = 2
    ids = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    positions = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    graph, logits = torch.cuda.CUDAGraph(), None
    for step in range(STEPS):
        ids.copy_(tokens_for(step, rows))
        positions.copy_(torch.tensor(eager.executor.cache.lengths)[:, None])
        truth = step_logits(model, eager, ids, positions)
        if step < 2:  # warm-up: kernels compile outside the capture
            got = step_logits(model, captured, ids, positions)
        elif step == 2:
            lengths = list(captured.executor.cache.lengths)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                logits = step_logits(model, captured, ids, positions)
            captured.executor.cache.lengths = lengths
            captured.executor.cache.advance_host([1] * rows)
            graph.replay()
            got = logits
        else:
            captured.executor.cache.before_decode()
            captured.executor.cache.after_decode()
            graph.replay()
            got = logits
        assert torch.allclose(got, truth, atol=1e-4, rtol=1e-4), f"step {step}"
    captured.executor.cache.check_integrity()
    for i, layer in captured.executor.cache.full.items():
        twin = eager.executor.cache.full[i]
        assert torch.equal(layer.slot_of, twin.slot_of) and torch.equal(layer.counters, twin.counters)
        assert int(layer.counters[..., 4].sum()) > 0, "blocks were evicted inside the graph"


@pytest.mark.gpu
def test_no_host_sync_in_a_decode_step():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(audit={"every": 0}))
    cache = prefilled(model)
    ids = tokens_for(0, 2)
    positions = torch.tensor(cache.executor.cache.lengths, device=DEVICE)[:, None]
    step_logits(model, cache, ids, positions)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_logits(model, cache, ids, positions + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
