"""How kernels are launched: measured choices from `launch_table.json`, rules where it has none.

The table is written by `python -m bench kernels --tune`. An entry names an op, an architecture, the features of
a call and what to use; without an entry a wrapper takes its own default, which is correct everywhere.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("launch_table.json")
PROGRAMS = 264  # that keep a GPU busy: about two per multiprocessor of a large part
MAX_SPLITS = 32
LATE_BYTES = 32768  # that are worth a part of their own: the attention of a part costs 2 KiB of scratch
MAX_LATE_PARTS = 64
ESTIMATED_BLOCKS = 64  # of a part of `attend_centroids`, where there are enough
FEW_ROWS = 16  # that `linear_few` takes: one tile of the tensor core


@cache
def entries() -> list[dict[str, Any]]:
    """Return the table, read once; an entry is {"op", "arch", "heads", "features", "use"}."""
    return list(json.loads(TABLE.read_text(encoding="utf-8")))


@cache
def arch_of(device: torch.device) -> int:
    """Return the compute capability as one number, 90 for 9.0; 0 on the CPU."""
    if device.type == "cpu":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


@cache
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program may use; 0 on the CPU, where it does not matter."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def launch_of(op: str, device: torch.device, heads: int, **features: int) -> dict[str, int]:
    """Return what the table says of a call, or nothing.

    Args:
        op: name of the op.
        device: where it runs.
        heads: (row, KV head) pairs of the call. The entry for the next larger number counts, else the largest.
        features: everything else an entry must match exactly.
    """
    return _find(op, arch_of(device), heads, tuple(sorted(features.items())))


@cache
def _find(op: str, arch: int, heads: int, features: tuple[tuple[str, int], ...]) -> dict[str, int]:
    wanted = (op, arch, dict(features))
    found = [e for e in entries() if (e["op"], e["arch"], e["features"]) == wanted]
    if not found:
        return {}
    larger = [e for e in found if e["heads"] >= heads]
    best = min(larger, key=_heads) if larger else max(found, key=_heads)
    return dict(best["use"])


def _heads(entry: dict[str, Any]) -> int:
    return int(entry["heads"])


@contextmanager
def candidate(
    op: str, device: torch.device, heads: int, features: dict[str, int], use: dict[str, int]
) -> Iterator[None]:
    """Put one entry in place of those that match it, while inside: how the tuner tries things."""
    before = list(entries())
    put(op, device, heads, features, use)
    try:
        yield
    finally:
        replace(before)


def put(op: str, device: torch.device, heads: int, features: dict[str, int], use: dict[str, int]) -> None:
    """Put one entry in place of what the table said of the same call, in this process."""
    key = {"op": op, "arch": arch_of(device), "heads": heads, "features": features}
    replace([e for e in entries() if {name: e[name] for name in key} != key] + [key | {"use": use}])


def replace(table: list[dict[str, Any]]) -> None:
    """Let `table` count from now on, in this process."""
    entries()[:] = table
    _find.cache_clear()


def attend_splits(heads: int, blocks: int, device: torch.device) -> int:
    """Return into how many parts the blocks of a (row, KV head) are split so that the device is busy.

    Args:
        heads: (row, KV head) pairs.
        blocks: blocks that each attends to at most.
        device: where it runs.
    """
    programs = PROGRAMS if device.type == "cuda" else torch.get_num_threads()
    programs = launch_of("attend_splits", device, heads).get("programs", programs)
    return max(1, min(-(-programs // heads), MAX_SPLITS, blocks))


def late_parts(blocks: int, block_bytes: int) -> int:
    """Return how many parts to keep for the loaded blocks of a (row, KV head): one a block, of small blocks fewer.

    Args:
        blocks: blocks that may be missing at most.
        block_bytes: bytes of one.
    """
    together = max(1, LATE_BYTES // block_bytes, -(-blocks // MAX_LATE_PARTS))
    return -(-blocks // together)


def estimate_splits(heads: int, blocks: int, device: torch.device) -> int:
    """Return into how many parts `attend_centroids` splits up to `blocks` blocks of a (row, KV head).

    A part is worth a launch's programs only from some tiles of means on.
    """
    return attend_splits(heads, -(-blocks // ESTIMATED_BLOCKS), device)


def few_rows_config(
    n: int, k: int, rows: int, itemsize: int, device: torch.device
) -> tuple[int, int, int, int] | None:
    """Return how `linear_few` runs where it was measured to beat torch; None where torch shall do the product.

    Costs a look into a dictionary, so it may be asked at every product. An entry's `max_rows` is the largest number
    of rows at which the op won.

    Args:
        n: output channels.
        k: input channels.
        rows: of the input.
        itemsize: bytes of an element.
        device: where it runs.

    Returns:
        Output channels a program, input channels a step, warps, steps in flight.
    """
    if rows > FEW_ROWS:
        return None
    use = _find("linear_few", arch_of(device), 0, (("itemsize", itemsize), ("k", k), ("n", n)))
    if rows > use.get("max_rows", 0):
        return None
    return use["block_n"], use["block_k"], use["num_warps"], use["num_stages"]
