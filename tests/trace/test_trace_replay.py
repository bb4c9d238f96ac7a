"""A trace replayed: shares, capacities other than the run's, prefetch by ids, and the forecast by hand."""

from dataclasses import replace

import numpy as np
import pytest

from rheo_offload.errors import TraceError
from rheo_offload.trace.analysis import analyse
from rheo_offload.trace.file import NO_BLOCK, Trace
from rheo_offload.trace.forecast import Machine, exposed_ms, step_ms
from rheo_offload.trace.replay import Selected, forecast, replay, start_of
from rheo_offload.trace.simulate import POLICIES
from tests.trace.conftest import made

MACHINE = Machine(
    num_layers=1, num_kv_heads=1, block_bytes=1000, link_bytes_per_s=1e6, attention_bytes_per_s=4e6,
    rest_of_layer_s=5e-3,
)  # fmt: skip
"""A block takes 1 ms over the link and 0.25 ms to attend to."""


def idled(ids: np.ndarray) -> np.ndarray:
    """Selections whose second step is empty."""
    ids = ids.copy()
    ids[..., 1, :] = NO_BLOCK
    return ids


def test_shares_leave_the_tail_out():
    trace = made(["12", "13", "12"])  # misses 2, 1, 0 of three closed blocks a step, one of them the sink
    selected, found = Selected.of(trace), replay(trace, "lru")
    assert found.demand.ravel().tolist() == [2, 1, 0] and found.forced.sum() == 0
    assert selected.all.ravel().tolist() == [3, 3, 3] and selected.forced.ravel().tolist() == [1, 1, 1]
    assert found.hit_rate(selected) == pytest.approx(1 - 3 / 9)
    assert found.hit_rate_unforced(selected) == pytest.approx(1 - 3 / 6)
    assert found.hit_rate(selected, skip=1) == pytest.approx(1 - 1 / 6)
    assert found.link_blocks(selected) == found.demand_blocks(selected) == 1.0
    idle = replace(trace, lens=np.array([[9501], [0], [9503]], dtype=np.int32), ids=idled(trace.ids))
    assert replay(idle, "lru").demand_blocks(Selected.of(idle)) == 1.0  # 2 and 0 in two steps


def test_more_capacity_never_hurts_lru_and_belady(run):
    trace, _ = run
    for policy in ("lru", "belady"):
        misses = [replay(trace, policy, ratio=r).demand.sum() for r in (1.25, 1.5, 2.0, 3.0)]
        assert misses == sorted(misses, reverse=True) and misses[0] > misses[-1]
    for ratio in (1.0, 1.5):
        best = replay(trace, "belady", ratio=ratio).demand.sum()
        assert all(best <= replay(trace, p, ratio=ratio).demand.sum() for p in POLICIES)


def test_a_pool_for_everything_misses_nothing(run):
    assert replay(run[0], "lru", ratio=4.0).demand.sum() == 0


def test_how_another_capacity_starts():
    trace = made(["12"], capacity=6, used="903124", order="7341025689")

    def held(capacity: int) -> list[int]:
        return np.flatnonzero(start_of(trace, (0, 0, 0), capacity, 10)).tolist()

    assert held(6) == [0, 1, 2, 3, 4, 9]  # the run's own
    assert held(8) == [0, 1, 2, 3, 4, 5, 7, 9]  # and the hottest absent ones, 7 and 5
    assert held(4) == [0, 3, 4, 9]  # forced, then the hottest of those that were resident
    used = start_of(trace, (0, 0, 0), 7, 10)
    assert used[7] < used[9] < used[0] < used[3]  # what the run did not hold leaves first


def two_layers(*layers: list[str]) -> Trace:
    """A trace of one head whose layers select these steps."""
    parts = [made(steps) for steps in layers]
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("ids", "misses", "start_used", "start_order")
    }
    return replace(parts[0], **joined, meta={**parts[0].meta, "layers": [*range(len(parts))]})


def test_prefetch_by_ids():
    trace = two_layers(["12", "34", "12"], ["34", "34", "56"])
    before = replay(trace, "previous-layer")
    plain = replay(trace, "lru")
    np.testing.assert_array_equal(before.demand[0], plain.demand[0])  # the first layer has none before it
    # layer 1: 1 and 2 come in vain, 1 leaves again; then 3 and 4 are there; then 1 comes again, 2 is still there
    assert before.early["layer"][1].ravel().tolist() == [2, 0, 1]
    assert before.demand[1].ravel().tolist() == [2, 0, 2]
    assert before.useful == 0
    perfect = replay(trace, "perfect")
    assert perfect.demand.sum() == 0 and perfect.early["layer"].sum() == perfect.useful > 0


@pytest.mark.parametrize("ratio", [0.99, 0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_capacity_is_refused(ratio):
    with pytest.raises(TraceError, match="least is 1.0"):
        replay(made(["12"]), "lru", ratio=ratio)


def test_unknown_policies_and_empty_windows_are_refused():
    with pytest.raises(TraceError, match="unknown policy 'mru'; known: fifo, lru"):
        replay(made(["12"]), "mru")
    for skip in (2, -1):
        with pytest.raises(TraceError, match="leaves nothing of 2"):
            analyse(made(["12", "12"]), ratios=[1.0], machine=MACHINE, skip=skip)
    with pytest.raises(TraceError, match="leaves nothing of 2"):
        forecast(made(["1", "1"]), replay(made(["1", "1"]), "lru"), rows=1, machine=MACHINE, skip=2)


# ---- forecast ------------------------------------------------------------------------------------------------


def test_exposed_is_what_attention_over_the_hits_does_not_hide():
    # 4 blocks attended: 1 ms if all hit. 2 misses: 2 ms over the link beside 0.5 ms of hits.
    demand = np.array([[0], [1], [2]])
    ms, moved = exposed_ms(demand, 0 * demand, 0 * demand, rows=1, block_budget=4, machine=MACHINE)
    assert ms.tolist() == pytest.approx([0.0, 1 - 0.75, 2 - 0.5])
    assert moved.tolist() == [0.0, 1000.0, 2000.0]
    assert step_ms(1.5, rows=1, block_budget=4, machine=MACHINE) == pytest.approx(5 + 1 + 1.5)


def test_a_forecast_in_the_traces_own_geometry():
    trace = made(["12", "13", "12"])
    found = forecast(trace, replay(trace, "lru"), rows=1, machine=MACHINE)
    assert found.exposed_ms == pytest.approx(((2 - 0.5) + (1 - 0.75) + 0) / 3)
    assert found.tokens_per_s == pytest.approx(1e3 / found.step_ms) and found.link_bytes == 1000
    many = forecast(trace, replay(trace, "lru"), rows=32, machine=MACHINE)
    assert many.link_bytes == pytest.approx(32 * found.link_bytes)  # rows begin elsewhere, but miss as often
    assert many.tokens_per_s == pytest.approx(32e3 / many.step_ms)


def test_a_forecast_for_another_model_draws_streams(run):
    trace, _ = run
    found = replay(trace, "lru", ratio=1.0)
    target = Machine()
    small, large = (forecast(trace, found, rows=rows, machine=target) for rows in (1, 4))
    per_head = found.demand.mean() * target.block_bytes * target.num_layers * target.num_kv_heads
    assert small.link_bytes == pytest.approx(per_head, rel=0.1)
    assert large.link_bytes == pytest.approx(4 * per_head, rel=0.1)
    faster = forecast(trace, found, rows=4, machine=Machine(link_bytes_per_s=500e9))
    assert faster.exposed_ms < large.exposed_ms and faster.tokens_per_s > large.tokens_per_s


def test_analysis_notices_a_run_that_was_disturbed(run):
    trace, _ = run
    quiet = analyse(trace, ratios=[1.5], machine=Machine(), policies=["lru"], batches=[1])
    assert quiet.disagreement == 0 and "as many blocks as it did" in quiet.check_line()
    misses = trace.misses.copy()
    misses[0, 0, 0, :3] += 1
    loud = analyse(
        replace(trace, misses=misses), ratios=[1.5], machine=Machine(), policies=["fifo"], batches=[1]
    )
    assert loud.disagreement == 3 and "something else than decoding" in loud.check_line()
    assert [found.policy for found in loud.replays] == ["fifo"]
    assert [found.policy for found, _ in loud.forecasts] == ["lru", "lru"]


def test_a_trace_whose_longest_row_was_left_out():
    """Blocks before the first step are counted over all rows, those that never decoded included."""
    trace = made(["12", "13"])
    longer = [(0, 0)] * 3 + [(0, 4)]
    wide = replace(
        trace,
        start_used=np.pad(trace.start_used, longer),
        start_order=np.pad(trace.start_order, longer, constant_values=NO_BLOCK),
    )
    np.testing.assert_array_equal(replay(wide, "lru").demand, replay(trace, "lru").demand)
