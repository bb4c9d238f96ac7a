"""Where `linear_few` beats torch: its candidates, and the entries of the launch table that follow from their times."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import geometric_mean
from typing import Any

import torch

from bench.schema import Row
from csrc_free_kernels import launch

# Output channels a program, input channels a step, warps, steps in flight.
CONFIGS = (
    (16, 256, 4, 4),
    (16, 512, 4, 4),
    (32, 128, 4, 6),
    (32, 256, 4, 4),
    (64, 128, 4, 5),
    (64, 256, 8, 4),
)
NAMES = ("block_n", "block_k", "num_warps", "num_stages")
MARGIN = 0.995  # of torch's time: what counts as faster


def entry(
    shape: tuple[int, ...], config: tuple[int, ...], max_rows: int, arch: int, itemsize: int
) -> dict[str, Any]:
    """Return the table's entry for a weight [N, K], won up to `max_rows` rows."""
    return {
        "op": "linear_few",
        "arch": arch,
        "heads": 0,
        "features": {"n": shape[0], "k": shape[1], "itemsize": itemsize},
        "use": dict(zip(NAMES, config, strict=True)) | {"max_rows": max_rows},
    }


@contextmanager
def only(entries: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Let these be all that the table says of `linear_few`, while inside."""
    before = list(launch.entries())
    launch.replace([e for e in before if e["op"] != "linear_few"] + list(entries))
    try:
        yield
    finally:
        launch.replace(before)


def table_after(rows: Sequence[Row], device: torch.device) -> list[dict[str, Any]]:
    """Return the launch table with what these rows say in place of what it said of their weights."""
    itemsize, arch = getattr(torch, rows[0].dtype).itemsize if rows else 0, launch.arch_of(device)
    timed = [entry(shape, CONFIGS[0], 0, arch, itemsize) for shape in _times(rows)]
    told = [(e["op"], e["arch"], e["features"]) for e in timed]
    kept = [e for e in launch.entries() if (e["op"], e["arch"], e["features"]) not in told]
    return kept + best_entries(rows, device)


def best_entries(rows: Sequence[Row], device: torch.device) -> list[dict[str, Any]]:
    """Return an entry for every weight of which some candidate beats torch at the fewest rows that were timed.

    It is the candidate that does so up to the most rows, and then the fastest; a candidate that was wrong once or lost
    at fewer rows counts no further.

    Args:
        rows: of the products of one dtype, for any numbers of rows.
        device: they were timed on.
    """
    found = []
    for shape, subjects in _times(rows).items():
        torchs = [times for name, times in subjects.items() if not name.startswith("few-")]
        ratios = {name: _ratios(times, torchs) for name, times in subjects.items() if name.startswith("few-")}
        won = [(-max(r), geometric_mean(r.values()), name) for name, r in ratios.items() if r]
        if won:
            most, _, name = min(won)
            config = tuple(int(n) for n in name.removeprefix("few-").split("x"))
            itemsize = getattr(torch, rows[0].dtype).itemsize
            found.append(entry(shape, config, -most, launch.arch_of(device), itemsize))
    return found


def _times(rows: Sequence[Row]) -> dict[tuple[int, ...], dict[str, dict[int, float]]]:
    """Weight [N, K] -> subject -> rows -> ms, of the products that were right."""
    times: dict[tuple[int, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.p50 is not None:
            shape = tuple(int(n) for n in row.case_id.split("-")[-1].split("x"))
            times.setdefault(shape, {}).setdefault(row.baseline, {})[row.batch or 1] = row.p50
    return times


def _ratios(ours: dict[int, float], torchs: Sequence[dict[int, float]]) -> dict[int, float]:
    """Rows -> our time over torch's best, up to the most rows before we lose."""
    won = {}
    for rows in sorted(set().union(*torchs)):
        ratio = ours.get(rows, float("inf")) / min(t[rows] for t in torchs if rows in t)
        if ratio > MARGIN:
            break
        won[rows] = ratio
    return won
