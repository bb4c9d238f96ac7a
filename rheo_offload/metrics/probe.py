"""Measure what a machine can do for offloaded decoding: the link, the gather, pinning, host memory."""

import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import psutil
import torch

from rheo_offload.cache.host_memory import GIB, HostRange
from rheo_offload.cache.host_store import host_budget
from rheo_offload.device import (
    current_stream,
    device_free_bytes,
    event,
    host_free_bytes,
    is_cuda,
    synchronize,
)
from rheo_offload.ops import kernels_for

MIB = 1 << 20
PACKAGES = ("torch", "triton", "numba", "numpy", "transformers")
GATHER_BLOCK_KIB = (4, 16, 32)
GATHER_HEADS = 8

# The verdict's example: an 8B model (32 layers, 8 KV heads of 128, 2-byte elements), 4096 tokens attended.
EXAMPLE_KV_BYTES_PER_TOKEN = 32 * 8 * 128 * 2 * 2
EXAMPLE_BUDGET_BYTES = 4096 * EXAMPLE_KV_BYTES_PER_TOKEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much each measurement moves, and how often."""

    copy_bytes: int = 512 * MIB
    gather_bytes: int = 128 * MIB
    """Bytes of one gather; they are picked at random from eight times as many."""
    pin_bytes: int = 8 * GIB
    read_bytes: int = 2 * GIB
    runs: int = 9

    def within(self, free_bytes: int) -> "Sizes":
        """The same with the large allocations cut to a quarter of the free host memory."""
        most = free_bytes // 4
        return Sizes(
            copy_bytes=min(self.copy_bytes, most),
            gather_bytes=min(self.gather_bytes, most // 8),
            pin_bytes=min(self.pin_bytes, most),
            read_bytes=min(self.read_bytes, most),
            runs=self.runs,
        )


QUICK = Sizes(copy_bytes=128 * MIB, gather_bytes=32 * MIB, pin_bytes=GIB, read_bytes=512 * MIB, runs=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    """Median of the runs."""
    unit: str
    """GB/s is 1e9 bytes a second."""
    runs: int
    limit: float | None = None
    """What it cannot beat on this machine, in the same unit; None where that is not known."""
    limit_is: str | None = None


def versions() -> dict[str, str]:
    """Installed versions of everything whose behaviour this package depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = torch.version.cuda or "none"
    found["driver"] = _driver_version() or "none found"
    return found


def host_facts() -> dict[str, int | None]:
    """Cores and memory of the host; None for "unlimited"."""
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "total_bytes": int(psutil.virtual_memory().total),
        "free_bytes": host_free_bytes(),
        "auto_budget_bytes": host_budget("auto"),
        "locked_limit_bytes": None if locked == resource.RLIM_INFINITY else locked,
    }


def device_facts(device: torch.device) -> dict[str, Any] | None:
    """Name and memory of the GPU; None on the CPU."""
    if not is_cuda(device):
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "total_bytes": int(properties.total_memory),
        "free_bytes": device_free_bytes(device),
    }


def median_s(device: torch.device, work: Callable[[int], object], runs: int) -> float:
    """Median seconds of `work(run)` on the device's current stream, after one warm-up with run 0."""
    work(0)
    synchronize(device)
    times = []
    for run in range(runs):
        start, end = event(device, timing=True), event(device, timing=True)
        queue = current_stream(device)
        start.record(queue)  # type: ignore[arg-type]
        work(run)
        end.record(queue)  # type: ignore[arg-type]
        synchronize(device)
        times.append(start.elapsed_time(end) / 1e3)  # type: ignore[arg-type]
    return statistics.median(times)


def link_bandwidth(device: torch.device, sizes: Sizes) -> list[Figure]:
    """One large copy each way between pinned host memory and the device."""
    with HostRange(sizes.copy_bytes, pin=is_cuda(device)) as memory:
        memory.ensure(sizes.copy_bytes)
        host = memory.tensor[: sizes.copy_bytes]
        on_device = torch.empty_like(host, device=device)
        figures = [
            Figure(name=name, value=sizes.copy_bytes / seconds / 1e9, unit="GB/s", runs=sizes.runs)
            for name, seconds in (
                (
                    "link_h2d",
                    median_s(device, lambda _: on_device.copy_(host, non_blocking=True), sizes.runs),
                ),
                (
                    "link_d2h",
                    median_s(device, lambda _: host.copy_(on_device, non_blocking=True), sizes.runs),
                ),
            )
        ]
    return figures


def gather_bandwidth(
    device: torch.device, block_bytes: int, sizes: Sizes, link: Figure | None = None, kernels: str = "auto"
) -> Figure:
    """The runtime's own gather of single KV blocks, scattered over the host memory, other blocks every run.

    Args:
        device: where the pool is.
        block_bytes: bytes of one block.
        sizes: how much one gather moves, from eight times as much.
        link: the large host-to-device copy, which no gather beats.
        kernels: see `ops.kernels_for`.
    """
    count = max(1, sizes.gather_bytes // block_bytes)
    pages = -(-8 * count // GATHER_HEADS)
    host_bytes, elements = pages * GATHER_HEADS * block_bytes, block_bytes // 2
    gather = kernels_for(device, kernels).gather
    order = torch.randperm(pages * GATHER_HEADS)[: 8 * count].to(device, torch.int32).view(8, count)
    slots = torch.arange(count, dtype=torch.int32, device=device)
    load_count = torch.tensor([count], dtype=torch.int32, device=device)
    total = torch.zeros(1, dtype=torch.int64, device=device)
    pool = torch.empty(count, elements, dtype=torch.bfloat16, device=device)
    with HostRange(host_bytes, pin=is_cuda(device)) as memory:
        memory.ensure(host_bytes)
        blocks = memory.tensor[:host_bytes].view(torch.bfloat16).view(pages, GATHER_HEADS, elements)
        seconds = median_s(
            device, lambda run: gather(order[run % 8], slots, load_count, blocks, pool, total), sizes.runs
        )
    if int(total) != count * (sizes.runs + 1):
        raise RuntimeError(f"the gather moved {int(total)} blocks instead of {count * (sizes.runs + 1)}")
    return Figure(
        name=f"gather_{block_bytes // 1024}k",
        value=count * block_bytes / seconds / 1e9,
        unit="GB/s",
        runs=sizes.runs,
        limit=link.value if link else None,
        limit_is="one large copy" if link else None,
    )


def pinning_rate(device: torch.device, sizes: Sizes) -> Figure:
    """Seconds to make a GiB of new host memory usable: touched, and registered when there is a GPU."""
    pin, runs, times = is_cuda(device), min(3, sizes.runs), []
    for _ in range(runs):
        with HostRange(sizes.pin_bytes, pin=pin) as memory:
            start_s = time.perf_counter()
            memory.ensure(sizes.pin_bytes)
            times.append(time.perf_counter() - start_s)
    return Figure(
        name="pin" if pin else "touch",
        value=statistics.median(times) / (sizes.pin_bytes / GIB),
        unit="s/GiB",
        runs=runs,
    )


# One part a thread adds up its share of `words` (uint64); the sums keep the reads from being dropped.
@nb.njit(parallel=True)
def _add_up(words: Any, parts: int) -> Any:
    totals = np.zeros(parts, np.uint64)
    for i_part in nb.prange(parts):
        total = np.uint64(0)
        for i in range(words.size * i_part // parts, words.size * (i_part + 1) // parts):
            total += words[i]
        totals[i_part] = total
    return totals.sum()


def cpu_read_bandwidth(sizes: Sizes) -> Figure:
    """All threads stream through memory once; the CPU's share of the attention is bound by this."""
    words = np.ones(sizes.read_bytes // 8, np.uint64)
    threads = nb.get_num_threads()
    seconds = median_s(torch.device("cpu"), lambda _: _add_up(words, threads), sizes.runs)
    return Figure(name="cpu_read", value=words.nbytes / seconds / 1e9, unit="GB/s", runs=sizes.runs)


def measure(
    device: torch.device, sizes: Sizes, progress: Callable[[str], None] = lambda _: None
) -> list[Figure]:
    """Run every measurement that the device allows, one after the other.

    Args:
        device: cuda or cpu.
        sizes: cut to the free host memory here.
        progress: called with what comes next.
    """
    sizes = sizes.within(host_free_bytes())
    figures = []
    if is_cuda(device):
        progress("link")
        figures += link_bandwidth(device, sizes)
        for kib in GATHER_BLOCK_KIB:
            progress(f"gather of {kib} KiB blocks")
            figures.append(gather_bandwidth(device, kib * 1024, sizes, link=figures[0]))
    progress("new host memory")
    figures.append(pinning_rate(device, sizes))
    progress("reading host memory")
    figures.append(cpu_read_bandwidth(sizes))
    return figures


def verdict(figures: list[Figure], host: dict[str, int | None]) -> list[str]:
    """Say in plain words what limits decoding here, for an 8B model that attends to 4096 tokens."""
    rate = {figure.name: figure.value * 1e9 for figure in figures if figure.unit == "GB/s"}
    budget_bytes = host["auto_budget_bytes"] or 0
    lines = []
    gather = rate.get("gather_32k")
    if gather is None:
        lines.append(
            "No GPU: nothing crosses a link. Reading 512 MiB of K/V a token, memory bandwidth allows "
            f"{rate['cpu_read'] / EXAMPLE_BUDGET_BYTES:.0f} tokens/s."
        )
    else:
        at_one = gather / (EXAMPLE_BUDGET_BYTES * 0.01)
        lines.append(
            f"The link caps decoding, all rows together, at {at_one:,.0f} tokens/s with 1 % misses "
            f"and {at_one / 5:,.0f} with 5 %."
        )
        if gather < 0.8 * rate["link_h2d"]:
            lines.append(
                f"Gathering 32 KiB blocks reaches {gather / rate['link_h2d']:.0%} of the link; 80 % is usual."
            )
        ratio = rate["cpu_read"] / gather
        lines.append(f"Host memory is read {ratio:.1f} times as fast as the link carries it.")
    tokens = budget_bytes // EXAMPLE_KV_BYTES_PER_TOKEN
    lines.append(f"Host memory holds {tokens:,} tokens ({budget_bytes / GIB:.1f} GiB, 80 % of what is free).")
    locked = host["locked_limit_bytes"]
    if gather is not None and locked is not None and locked < budget_bytes:
        lines.append(
            f"The limit on locked memory is {locked / MIB:.0f} MiB (`ulimit -l`). CUDA usually pins beyond "
            "it; raise it if pinning is refused."
        )
    return lines


def report(
    device: torch.device, sizes: Sizes, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Everything above as one JSON-ready dict: versions, device, host, figures, verdict."""
    host = host_facts()
    figures = measure(device, sizes, progress)
    return {
        "versions": versions(),
        "device": device_facts(device),
        "host": host,
        "figures": [asdict(figure) for figure in figures],
        "verdict": verdict(figures, host),
    }


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)*\b", text)
    return found.group() if found else None
