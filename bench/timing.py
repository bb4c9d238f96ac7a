"""Clocks, quantiles and the measured rates that floors are made of."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20  # larger than any L2
RATE_SAMPLES = 10


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The three numbers a row reports, and of how many samples."""

    p20: float
    p50: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quantiles":
        """Summarise samples; at least one."""
        p20, p50, p80 = (
            float(x) for x in np.quantile(np.asarray(samples, dtype=np.float64), (0.2, 0.5, 0.8))
        )
        return cls(p20, p50, p80, len(samples))

    def map(self, fn: Callable[[float], float]) -> "Quantiles":
        """Transform by a monotone function; a falling one swaps the outer two."""
        low, mid, high = fn(self.p20), fn(self.p50), fn(self.p80)
        return Quantiles(min(low, high), mid, max(low, high), self.n)


def synchronise(device: torch.device) -> None:
    """Wait for the device; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    fn: Callable[[], object], n: int, device: torch.device, before: Callable[[], object] | None = None
) -> list[float]:
    """Time `n` calls one by one, without waiting for the device in between.

    On a GPU each call lies between two events of the current stream: host time during which the device idles
    counts too.

    Args:
        before: run ahead of each call, outside the measured interval.

    Returns:
        Milliseconds of each call.
    """
    synchronise(device)
    if device.type != "cuda":
        return [_time_on_cpu(fn, before) for _ in range(n)]
    events = []
    for _ in range(n):
        if before is not None:
            before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        events.append((start, end))
    synchronise(device)
    return [start.elapsed_time(end) for start, end in events]


def _time_on_cpu(fn: Callable[[], object], before: Callable[[], object] | None) -> float:
    if before is not None:
        before()
    start = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - start)


def flusher(device: torch.device) -> Callable[[], object]:
    """Return a function that overwrites the L2 cache (and keeps the device busy while the host launches)."""
    if device.type != "cuda":
        return lambda: None
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    return buffer.zero_


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured limits of this machine, bytes per second."""

    memory: float
    """Device memory, reads and writes added, of one large copy."""
    link: float
    """Host to device, of one large copy from pinned memory; on the CPU a plain copy."""


def measure_rates(device: torch.device, size_bytes: int) -> Rates:
    """Measure the rates that floors divide by, with copies of `size_bytes`.

    The link is that of one large copy: what a gather of many blocks is compared with.
    """
    source, target = (torch.empty(size_bytes, dtype=torch.uint8, device=device).zero_() for _ in range(2))
    host = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda").zero_()

    def rate(fn: Callable[[], object], moved_bytes: int) -> float:
        fn()
        return moved_bytes / (1e-3 * Quantiles.of(time_calls(fn, RATE_SAMPLES, device)).p50)

    return Rates(
        memory=rate(lambda: target.copy_(source), 2 * size_bytes),
        link=rate(lambda: target.copy_(host, non_blocking=True), size_bytes),
    )


class RegionProfiler:
    """Adds up the time of named regions; the cache calls `region` around its parts while one is attached.

    Regions on different streams overlap, and where the device waits for the host they include the waiting, so
    their sum is not the step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cpu_ms: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Measure what runs inside, on the stream that is current at entry."""
        if self.device.type != "cuda":
            start_s = time.perf_counter()
            yield
            self._cpu_ms[name] += 1e3 * (time.perf_counter() - start_s)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        yield
        end.record(stream)
        self._events.append((name, start, end))

    def totals_ms(self) -> dict[str, float]:
        """Wait for the device and return the milliseconds of every region since the last call."""
        synchronise(self.device)
        totals = self._cpu_ms
        for name, start, end in self._events:
            totals[name] += start.elapsed_time(end)
        self._cpu_ms, self._events = defaultdict(float), []
        return dict(totals)


class PeakMeter:
    """Peak device memory of one subject, although others may hold memory beside it."""

    def __init__(self, device: torch.device, shared_bytes: int) -> None:
        self.device, self.shared_bytes = device, shared_bytes
        self.held_bytes = 0
        self.peak_bytes: int | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what the subject allocates inside; the weights (`shared_bytes`) are part of every peak."""
        if self.device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            rise = torch.cuda.max_memory_allocated(self.device) - before
            self.peak_bytes = max(self.peak_bytes or 0, self.shared_bytes + self.held_bytes + rise)
            self.held_bytes += torch.cuda.memory_allocated(self.device) - before
