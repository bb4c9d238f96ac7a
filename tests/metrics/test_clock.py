"""The clock of a run: first token, distances, and what it keeps of a run without end."""

from rheo_offload.metrics import clock as clock_module
from rheo_offload.metrics.clock import RunClock


def test_times_of_a_run(monkeypatch):
    now = iter([10.0, 12.0, 12.5, 14.0])
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: next(now))
    clock = RunClock.__new__(RunClock)
    clock.start(100, 2)
    for _ in range(3):
        clock.tick()
    assert clock.started == 10.0 and clock.first == 12.0 and clock.last == 14.0
    assert list(clock.gaps) == [0.5, 1.5] and clock.generated == 6
    clock.finish(5)
    assert clock.generated == 5


def test_a_run_without_end_keeps_the_last_distances(monkeypatch):
    monkeypatch.setattr(clock_module, "GAPS_KEPT", 8)
    clock = RunClock()
    for _ in range(100):
        clock.tick()
    assert clock.ticks == 100 and len(clock.gaps) == 8
