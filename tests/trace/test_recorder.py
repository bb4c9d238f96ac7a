"""A recording of a user's own run: the run's counters, its misses step by step, and where a recording ends."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rheo_offload import Engine, RheoConfig, SamplingParams, offload
from rheo_offload.errors import TraceError
from rheo_offload.trace.file import NO_BLOCK, Trace
from rheo_offload.trace.recorder import Recorder, record
from rheo_offload.trace.replay import Selected, replay
from tests.helpers.tiny_model import tiny_model
from tests.trace.conftest import SETTINGS, prompt, small_pool


def test_counters_of_the_run_are_those_of_the_trace(run):
    trace, stats = run
    selected = Selected.of(trace)
    assert trace.steps == 70 and trace.ids.shape == (2, 2, 2, 70, 8)
    assert (selected.all.sum(), trace.misses.sum()) == (stats.selected_blocks, stats.miss_blocks)
    assert stats.miss_blocks > 300
    own = replay(trace, "lru")
    assert own.hit_rate(selected) == pytest.approx(stats.hit_rate, abs=1e-12)
    assert own.hit_rate_unforced(selected) == pytest.approx(stats.hit_rate_unforced, abs=1e-12)


def test_lru_at_the_runs_capacity_misses_what_the_run_missed_in_every_step(run):
    trace, _ = run
    own = replay(trace, "lru")
    assert own.capacity == 10
    np.testing.assert_array_equal(own.demand, trace.misses)
    assert (replay(trace, "fifo").demand != trace.misses).any()


def test_lengths_and_provenance(run):
    trace, _ = run
    assert trace.lens[:, 0].tolist() == list(range(330, 400))
    assert trace.lens[:, 1].tolist() == list(range(293, 363))
    assert trace.meta["block_budget"] == 8 and trace.meta["layers"] == [0, 1]
    assert trace.meta["stopped"] is None and trace.meta["versions"]["torch"] == torch.__version__
    assert trace.meta["block_bytes"] == 2 * 16 * 16 * 4


def recorded(model: Any, monkeypatch: pytest.MonkeyPatch | None = None, **kwargs: Any) -> Recorder:
    with record(model) as recorder:
        model.generate(max_new_tokens=18, do_sample=False, **kwargs)
    return recorder


def test_a_ring_that_is_emptied_in_between_records_the_same(monkeypatch):
    whole = recorded(small_pool(), **prompt(2, 170, 9)).trace()
    monkeypatch.setattr("rheo_offload.trace.recorder.RING_STEPS", 8)
    recorder = recorded(small_pool(), **prompt(2, 170, 9))
    assert recorder.ring_steps == 8
    parts = recorder.trace()
    for name in ("ids", "lens", "misses", "start_used", "start_order"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_transformers_own_loop_is_recorded_too():
    """A repetition penalty runs in transformers' loop, without a stepper."""
    trace = recorded(small_pool(), repetition_penalty=1.2, **prompt(1, 200)).trace()
    assert trace.steps == 18
    np.testing.assert_array_equal(replay(trace, "lru").demand, trace.misses)


def test_sliding_and_dense_layers_take_no_part():
    kinds = ["sliding_attention", "full_attention"] * 2
    model = small_pool("gemma3", "selection.dense_layers=[3]", layer_types=kinds, num_hidden_layers=4)
    trace = recorded(model, **prompt(1, 200)).trace()
    assert trace.meta["layers"] == [1]
    np.testing.assert_array_equal(replay(trace, "lru").demand, trace.misses)


def test_short_rows_select_everything_and_pad():
    trace = recorded(small_pool(), **prompt(1, 40)).trace()
    assert (trace.ids[..., 0, :3] == [0, 1, 2]).all() and (trace.ids[..., 0, 3:] == NO_BLOCK).all()
    assert trace.misses.sum() == 0


def test_a_cache_with_a_prompt_is_recorded_from_where_it_is():
    model = small_pool()
    cache, inputs = model.rheo.new_cache(), prompt(1, 200)
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=10, do_sample=False)
    more = torch.cat([first, first[:, -3:]], 1)
    with record(model, cache) as recorder:
        model.generate(
            more,
            attention_mask=torch.ones_like(more),
            past_key_values=cache,
            max_new_tokens=20,
            do_sample=False,
        )
    trace = recorder.trace()
    assert trace.lens[0, 0] == 213 and trace.steps == 20
    np.testing.assert_array_equal(replay(trace, "lru").demand, trace.misses)


def test_nothing_looks_on_after_the_block():
    model = small_pool()
    recorder = recorded(model, **prompt(1, 100))
    assert model.rheo.on_executor is None and recorder._executor.observer is None
    before = recorder.trace().steps
    model.generate(**prompt(1, 100), max_new_tokens=3, do_sample=False)
    assert recorder.trace().steps == before


def test_rows_that_take_no_part_are_left_out():
    """An engine of two rows with one request: the other row sits every step out, and both the one beyond the end."""
    model = small_pool()
    ids = prompt(1, 300)["input_ids"][0].tolist()
    with record(model) as recorder, Engine(model, max_rows=2, max_context_tokens=400) as engine:
        engine.submit(ids, SamplingParams(max_new_tokens=20))
        engine.run()
        trace = recorder.trace()
        assert trace.meta["stopped"] is None
    assert trace.lens.ravel().tolist() == list(range(300, 320))
    assert trace.ids.shape[1] == trace.start_used.shape[1] == 1 and trace.misses.sum() > 0
    np.testing.assert_array_equal(replay(trace, "lru").demand, trace.misses)


def test_a_smaller_step_blanks_the_other_rows(monkeypatch):
    """The ring is used again: what an earlier step left of the rows beyond this one's bucket must not stay."""
    monkeypatch.setattr("rheo_offload.trace.recorder.RING_STEPS", 8)
    model = small_pool()
    cache = model.rheo.new_cache()
    model.generate(**prompt(2, 40), past_key_values=cache, max_new_tokens=2, do_sample=False)
    recorder = Recorder(model.rheo)
    recorder.attach(cache.executor)
    cache.executor.cache.step_lens.copy_(torch.tensor([7, 9]))
    for rows in (*[2] * 8, 1):
        recorder.begin(rows)
    assert recorder._lens[:2].tolist() == [[7, 0], [7, 9]]


class _Launches(TorchDispatchMode):
    """Every op that torch runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_a_step_records_the_same_launches_every_time_and_waits_for_nothing(monkeypatch):
    """What a graph captures must not depend on a value, and must not read one on the host."""
    steps: list[list[str]] = []
    begin, note = Recorder.begin, Recorder.note

    def watched(self: Recorder, rows: int) -> None:
        with _Launches() as launches:
            begin(self, rows)
        steps.append(launches.names)

    def noted(self: Recorder, *args: Any) -> None:
        with _Launches() as launches:
            note(self, *args)
        steps[-1].extend(launches.names)

    monkeypatch.setattr("rheo_offload.trace.recorder.RING_STEPS", 8)
    monkeypatch.setattr(Recorder, "begin", watched)
    monkeypatch.setattr(Recorder, "note", noted)
    recorded(small_pool(), **prompt(2, 170, 9))
    assert len(steps) == 18 and all(step == steps[0] for step in steps)
    assert steps[0].count("index_copy_") == 1 + 2 * 2
    reads = {"_local_scalar_dense", "nonzero", "item", "_to_cpu", "masked_select", "unique"}
    assert not reads & set(steps[0])


@pytest.mark.gpu
def test_captured_steps_record_what_eager_ones_do(monkeypatch):
    """Recorded; then captured again without the recorder; then once more with another one."""
    monkeypatch.setattr("rheo_offload.trace.recorder.RING_STEPS", 8)
    inputs = {name: value.cuda() for name, value in prompt(2, 200, 9).items()}

    def run(graph: str) -> Trace:
        model = small_pool("llama", f"execution.graph={graph}", device="cuda")
        cache = model.rheo.new_cache()
        with record(model) as recorder:
            first = model.generate(**inputs, past_key_values=cache, max_new_tokens=60, do_sample=False)
        if graph == "off":
            assert cache.stepper is None, "transformers' own loop"
        else:
            assert cache.stepper.runner.captured
        more = torch.cat([first, first[:, -1:]], 1)  # without the recorder, then with a new one
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more[:, 200:])], 1)
        turn = dict(attention_mask=mask, past_key_values=cache, do_sample=False)
        longer = model.generate(more, **turn, max_new_tokens=12)
        assert recorder.trace().steps == 60
        turn["attention_mask"] = torch.cat([mask, torch.ones_like(longer[:, more.shape[1] :])], 1)
        with record(model, cache) as again:
            model.generate(longer, **turn, max_new_tokens=20)
        second = again.trace()
        np.testing.assert_array_equal(replay(second, "lru").demand, second.misses)
        assert second.steps == 20
        return recorder.trace()

    captured, eager = run("auto"), run("off")
    assert captured.steps == 60
    for name in ("ids", "lens", "misses", "start_used", "start_order"):
        np.testing.assert_array_equal(getattr(captured, name), getattr(eager, name))
    np.testing.assert_array_equal(replay(captured, "lru").demand, captured.misses)


# ---- where a recording ends ----------------------------------------------------------------------------------


def test_another_turn_ends_it():
    model = small_pool()
    cache = model.rheo.new_cache()
    with record(model) as recorder:
        first = model.generate(**prompt(1, 200), past_key_values=cache, max_new_tokens=12, do_sample=False)
        more = torch.cat([first, first[:, -5:]], 1)
        mask = torch.ones_like(more)
        model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False)
    trace = recorder.trace()
    assert "went on from another place" in trace.meta["stopped"]
    assert trace.steps == 12
    np.testing.assert_array_equal(replay(trace, "lru").demand, trace.misses)


def test_another_run_ends_it(caplog):
    model = small_pool()
    with record(model) as recorder:
        for _ in range(2):
            model.generate(**prompt(1, 100), max_new_tokens=7, do_sample=False)
    assert recorder.trace().meta["stopped"] == "another run began" and recorder.trace().steps == 7
    assert "the trace ends after 7 steps: another run began" in caplog.text


def test_beams_that_become_copies_end_it():
    model = small_pool()
    with record(model) as recorder:
        model.generate(**prompt(1, 200), max_new_tokens=12, num_beams=3, do_sample=False)
    assert recorder.stopped == "rows became copies of other rows"
    trace = recorder.trace()
    assert 1 <= trace.steps < 12
    np.testing.assert_array_equal(replay(trace, "lru").demand, trace.misses)


# ---- refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_recorded_is_refused():
    with (
        pytest.raises(TraceError, match="offload\\(model\\) first"),
        record(tiny_model("llama")),
    ):
        pass
    model = small_pool("llama", "selection.method=full")
    with pytest.raises(TraceError, match="no layer of this run selects"), record(model):
        model.generate(**prompt(1, 50), max_new_tokens=2, do_sample=False)
    assert model.rheo.on_executor is None


def test_a_recording_without_steps_says_so():
    model = offload(tiny_model("llama"), RheoConfig().with_overrides(SETTINGS), check=False)
    with record(model) as recorder:
        pass
    with pytest.raises(TraceError, match="nothing was recorded"):
        recorder.trace()
