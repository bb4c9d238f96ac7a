"""Streams, events, pinned buffers and free memory: the one place that differs between CUDA and the CPU.

On the CPU work runs at once and in order, so its streams and events are stand-ins whose waits do nothing.
Callers write the CUDA version once.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor


class CpuEvent:
    """Stand-in for `torch.cuda.Event`: remembers the host time of `record`."""

    def __init__(self) -> None:
        self._recorded_s: float | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        self._recorded_s = time.perf_counter()

    def wait(self, stream: "Stream | None" = None) -> None:
        """Do nothing: earlier CPU work has already run."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Do nothing: earlier CPU work has already run."""

    def elapsed_time(self, end: "CpuEvent") -> float:
        """Milliseconds from this record to the one of `end`."""
        if self._recorded_s is None or end._recorded_s is None:
            raise ValueError("both events must be recorded before their distance is asked for")
        return (end._recorded_s - self._recorded_s) * 1e3


class CpuStream:
    """Stand-in for `torch.cuda.Stream`: work on it runs at once, in the order of the program."""

    def record_event(self, event: "CpuEvent | None" = None) -> CpuEvent:
        event = event or CpuEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Do nothing: earlier CPU work has already run."""


Stream = torch.cuda.Stream | CpuStream
Event = torch.cuda.Event | CpuEvent


def is_cuda(device: torch.device | str) -> bool:
    """True for CUDA, False for the CPU.

    Raises:
        ValueError: any other device type.
    """
    device = torch.device(device)
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"device must be cuda or cpu, not {device.type!r}")
    return device.type == "cuda"


def stream(device: torch.device | str) -> Stream:
    """Make a new side stream of the device."""
    return torch.cuda.Stream(device) if is_cuda(device) else CpuStream()


@cache
def capture_stream(device: torch.device) -> Any:
    """Return the one stream of a device that steps are captured on.

    torch's own is on whichever device was current at its first capture, and cuBLAS keeps a workspace for every stream
    that it has met.
    """
    return stream(device)


def current_stream(device: torch.device | str) -> Stream:
    """The stream that work is queued on now (inside a capture: the captured one)."""
    return torch.cuda.current_stream(device) if is_cuda(device) else CpuStream()


def event(device: torch.device | str, *, timing: bool = False) -> Event:
    """Make an event; `timing=True` lets `start.elapsed_time(end)` give milliseconds."""
    return torch.cuda.Event(enable_timing=timing) if is_cuda(device) else CpuEvent()


def on_stream(stream: Stream) -> AbstractContextManager[object]:
    """Queue the work of the `with` body on `stream`."""
    return nullcontext() if isinstance(stream, CpuStream) else torch.cuda.stream(stream)


def synchronize(device: torch.device | str) -> None:
    """Block the host until the device has finished all work. Not allowed during a capture."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def empty_pinned(*shape: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Make an uninitialised host tensor: pinned when `device` is CUDA, ordinary memory otherwise.

    For small buffers; the store of the KV blocks is `cache.host_memory.HostRange`.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=is_cuda(device))


def device_free_bytes(device: torch.device | str) -> int:
    """Bytes that torch can still allocate on the device, fragmentation aside.

    CUDA: what the driver says is free plus what torch's allocator holds but has not handed out.
    CPU: `host_free_bytes()`.
    """
    if not is_cuda(device):
        return host_free_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def host_free_bytes() -> int:
    """Bytes of host memory free without swapping: the machine's, or the control group's if that is less."""
    available = int(psutil.virtual_memory().available)
    limit = cgroup_free_bytes()
    return available if limit is None else min(available, limit)


def cgroup_free_bytes(
    root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes left under the memory limits of this process's control groups (v1 and v2), None without a limit.

    Every ancestor counts. Cached files are not usage: the kernel drops them before it enforces a limit.

    Args:
        root: where the control groups are mounted.
        proc: the file that lists the groups of the process.
    """
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    groups = (directory for line in lines for directory in _memory_groups(root, line))
    left = [free for directory in groups if (free := _group_free(directory)) is not None]
    return min(left, default=None)


def _memory_groups(root: Path, line: str) -> list[Path]:
    """The group that a line of /proc/self/cgroup names, and its ancestors up to the mount."""
    _, controllers, path = line.split(":", 2)
    if controllers and "memory" not in controllers.split(","):
        return []
    base = root / "memory" if controllers else root
    group = Path(path.lstrip("/"))
    return [base / group, *(base / parent for parent in group.parents if group != Path("."))]


def _group_free(directory: Path) -> int | None:
    """Limit minus usage of one group, v2 names first; None where the group has no limit."""
    for limit_file, usage_file, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            limit = (directory / limit_file).read_text().strip()
            usage = int((directory / usage_file).read_text())
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit == "max" or int(limit) >= 1 << 60:  # v1 writes "no limit" as a huge number
            return None
        cached = int(stat.get(f"{prefix}inactive_file", 0)) + int(stat.get(f"{prefix}active_file", 0))
        return max(0, int(limit) - max(0, usage - cached))
    return None
