"""Where the time of a step goes: kernel records of replayed graphs on a GPU, timed regions on the CPU.

Parts are told apart by kernel name. `attend` includes the loading of missing blocks and the attention over them, which
are the same op; `gather` is a load ahead of it. `idle` is what is left of the step.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import RegionProfiler, synchronise

PATTERNS = {
    "append": r"(ring_)?append\w*_kernel",
    "score": r"score_\w+_kernel",
    "decide": r"(decide|select|resolve|open_groups)\w*_kernel",
    "gather": r"gather_kernel",
    "attend": r"attend\w*_kernel",
    "merge": r"merge\w*_kernel",
    "sample": r"(search|mass|draw|peak|take)_kernel",
    "forced_drop": r"drop_kernel",
}
PARTS = ("model", "append", "score", "decide", "gather", "attend", "merge")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel record, microseconds."""

    name: str
    start: float
    end: float


def step_parts(subject: Any, steps: int) -> dict[str, float]:
    """Run `steps` untimed steps of one of our subjects; return milliseconds per step and part.

    On a GPU also `idle` and `span` (all of it).
    """
    device = subject.model.device
    if device.type == "cuda":
        return parts_of(profiled(subject.step, steps, device), steps)
    profiler = RegionProfiler(device)
    subject.attach(profiler)
    for _ in range(steps):
        with profiler.region("span"):
            subject.step()
    subject.attach(None)
    parts = {name: ms / steps for name, ms in profiler.totals_ms().items()}
    return parts | {"model": parts["span"] - sum(ms for name, ms in parts.items() if name != "span")}


def profiled(fn: Any, steps: int, device: torch.device) -> list[Kernel]:
    """Call `fn` `steps` times under the profiler; returns every kernel, copy and fill of the device, by start."""
    fn()
    synchronise(device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            fn()
        synchronise(device)
    records = [
        Kernel(e.name, e.time_range.start, e.time_range.end)
        for e in profile.events() or []
        if e.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(records, key=lambda k: k.start)


def part_of(name: str) -> str:
    """Return the part a kernel belongs to, by its name."""
    for part, pattern in PATTERNS.items():
        if re.fullmatch(pattern + r"(_\d\w*)?", name):  # some versions of Triton append the specialisation
            return part
    return "model"


def parts_of(kernels: Sequence[Kernel], steps: int) -> dict[str, float]:
    """Add kernel records up, ms per step."""
    parts: dict[str, float] = defaultdict(float)
    if not kernels:
        return {}
    labels = [part_of(k.name) for k in kernels]
    for kernel, label in zip(kernels, labels, strict=True):
        parts[label] += kernel.end - kernel.start
    busy = union(kernels)
    parts["span"] = max(k.end for k in kernels) - kernels[0].start
    parts["idle"] = parts["span"] - busy
    return {name: us / 1e3 / steps for name, us in parts.items()} | {"launches": len(kernels) / steps}


def union(kernels: Sequence[Kernel]) -> float:
    """Return the time during which at least one of the kernels (sorted by start) runs."""
    total, reached = 0.0, float("-inf")
    for kernel in kernels:
        if kernel.end > reached:
            total += kernel.end - max(kernel.start, reached)
            reached = kernel.end
    return total
