"""Which layers could take another layer's selection: overlaps of a recorded run, and the plan with the fewest scorers.

The plan is IndexCache's (arXiv:2603.12201) by HyLRA's rule (arXiv:2602.00777): a layer that scores serves those behind
it until the next one that scores, as long as each of them selects much the same blocks.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rheo_offload.errors import TraceError
from rheo_offload.model.reuse_plan import FORMAT
from rheo_offload.trace.file import NO_BLOCK, Trace

MOST_STEPS = 128  # of a trace that overlaps are measured on, evenly spread


def overlaps(trace: Trace) -> NDArray[np.float64]:
    """Return [L, L]: which share of what layer j chose layer i (i <= j) had chosen too, in the same step.

    Blocks that are forced are left out, and so are rows that the budget holds whole: there, every layer agrees.

    Raises:
        TraceError: no step is left, or the run reused selections itself.
    """
    if trace.meta.get("reuse_layers"):
        raise TraceError("the run reused selections already; record one with selection.reuse_layers={}")
    blocks = -(-trace.lens // trace.meta["block_size"])  # [T, R]
    row_steps = np.argwhere((blocks > trace.meta["block_budget"]).T)  # (row, step)
    if not len(row_steps):
        raise TraceError(
            "the budget held every row whole, so all layers agree; record longer rows or lower the budget"
        )
    row_steps = row_steps[np.unique(np.linspace(0, len(row_steps) - 1, MOST_STEPS).astype(int))]
    rows, steps = row_steps.T
    ids = trace.ids[:, rows, :, steps]  # [row-steps, L, H, S]
    held, first = blocks[steps, rows][:, None, None, None], trace.meta["sink_blocks"]
    chosen = (ids != NO_BLOCK) & (ids >= first) & (ids < held - trace.meta["recent_blocks"])
    layers = ids.shape[1]
    marks = np.zeros((layers, ids.shape[0], ids.shape[2], int(blocks.max()) + 1), dtype=bool)
    at = np.where(chosen, ids, marks.shape[3] - 1).swapaxes(0, 1)
    np.put_along_axis(marks, at.astype(np.int64), True, axis=-1)
    marks = marks[..., :-1]
    found = np.eye(layers)
    for j in range(layers):
        own = max(1, int(marks[j].sum()))
        for i in range(j):
            found[i, j] = int((marks[i] & marks[j]).sum()) / own
    return found


def plan_reuse(overlap: NDArray[np.float64], least_overlap: float) -> dict[int, int]:
    """Return layer -> the layer before it that it can reuse: the fewest layers score; among such plans, most overlap.

    Every layer takes the last one before it that scores, and overlaps with that by `least_overlap` or more.
    """
    count = len(overlap)
    best: list[tuple[int, float]] = [
        (0, 0.0)
    ]  # of the first n layers: how many score, minus the overlap of the others
    begins: list[int] = []
    for end in range(1, count + 1):
        choices = [
            (best[first][0] + 1, best[first][1] - float(overlap[first, first + 1 : end].sum()), -first)
            for first in range(end)
            if (overlap[first, first + 1 : end] >= least_overlap).all()
        ]
        scoring, gain, first = min(choices)
        best.append((scoring, gain))
        begins.append(-first)
    plan: dict[int, int] = {}
    end = count
    while end > 0:
        first = begins[end - 1]
        plan |= dict.fromkeys(range(first + 1, end), first)
        end = first
    return dict(sorted(plan.items()))


def write_plan(trace: Trace, least_overlap: float, path: Path) -> dict[str, Any]:
    """Plan from a trace, write the file that `selection.reuse_layers` takes, and return what it holds.

    Raises:
        TraceError: nothing to plan from, or the file cannot be written.
    """
    overlap, numbers = overlaps(trace), trace.meta["layers"]
    plan = plan_reuse(overlap, least_overlap)
    record = {
        "format": FORMAT,
        "model": trace.meta["model"],
        "config_hash": trace.meta["config_hash"],
        "method": trace.meta.get("method"),
        "selecting_layers": len(numbers),
        "num_kv_heads": int(trace.ids.shape[2]),
        "block_size": trace.meta["block_size"],
        "least_overlap": least_overlap,
        "layers": {str(numbers[j]): numbers[i] for j, i in plan.items()},
        "overlap": {str(numbers[j]): round(float(overlap[i, j]), 4) for j, i in plan.items()},
    }
    try:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot write {str(path)!r}: {error.strerror}") from error
    return record
