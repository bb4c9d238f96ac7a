"""The figure of a prefetch replay, from its rows.csv and nothing else."""

import importlib
from pathlib import Path
from typing import Any

from bench.schema import read_rows

__all__ = ["FIGURE", "draw"]

FIGURE = "prefetch.png"
SHOWN = {
    "lru": "ko-",
    "belady": "k^:",
    "evict-lowest": "s-",
    "agnostic-wide": "P-",
    "runner-up-1": "v-",
    "ahead-1": "D-",
    "ahead-1-half": "d-",
    "evict-lowest+ahead-1-half": "X-",
}
AXES = {"link_blocks_per_step": "blocks over the link", "demand_misses_per_step": "demand misses"}


def draw(folder: Path) -> Path | None:
    """Draw what is left on demand over what crosses the link, a line per policy over the pool sizes.

    Returns:
        The file, or None without matplotlib.
    """
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 5), layout="constrained")
    except ImportError:
        return None
    panels = sorted(_points(folder).items())
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, policies) in zip(grid, panels, strict=True):
        for policy, style in SHOWN.items():
            cases = list(policies.get(policy, {}).values())
            axes.plot(
                *([case[m] for case in cases] for m in AXES), style, markersize=5, linewidth=0.8, label=policy
            )
        axes.set(title=name, xscale="log", **dict(zip(("xlabel", "ylabel"), AXES.values(), strict=True)))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle("Per (row, layer, KV head) and step; from right to left the pool grows")
    figure.savefig(folder / FIGURE, dpi=110)
    return folder / FIGURE


def _points(folder: Path) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Return recording -> policy -> pool size -> metric -> value."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row in read_rows(folder / "rows.csv"):
        if row["metric"] in AXES:
            policy = str(row["baseline"])
            name, _, ratio = str(row["case_id"]).removesuffix(f"-{policy}").rpartition("-c")
            sizes = found.setdefault(name, {}).setdefault(policy, {})
            sizes.setdefault(ratio, {})[str(row["metric"])] = row["p50"]
    return found
