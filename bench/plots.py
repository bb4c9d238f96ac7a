"""Figures of a results folder, from its rows.csv and nothing else."""

import importlib
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.schema import read_rows

Record = dict[str, Any]

THROUGHPUT, SPLIT = "throughput.png", "step_split.png"
LABELS = {
    "no-attention": "model without attention",
}
PARTS = ("append", "score", "select", "resolve", "decide", "gather", "attend", "merge")


class PlotError(Exception):
    """The figures cannot be drawn; the message says why."""


def draw(folder: Path) -> list[Path]:
    """Draw tokens/s over batch size per context, and the parts of a step, into `folder`.

    Returns:
        The files written; a suite without such rows gives none.

    Raises:
        PlotError: matplotlib is missing, or the folder has no rows.csv.
    """
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise PlotError("the figures need matplotlib: install the [plot] extra") from error
    try:
        rows = [r for r in read_rows(folder / "rows.csv") if r["status"] == "ok" and r["p50"] is not None]
    except OSError as error:
        raise PlotError(f"cannot read {folder / 'rows.csv'}: {error.strerror}") from error
    steps = [r for r in rows if r["suite"] == "decode"]
    written = []
    for name, plot in ((THROUGHPUT, _throughput), (SPLIT, _split)):
        figure = figure_module.Figure(figsize=(10, 5), layout="constrained")
        if plot(figure, steps):
            figure.supxlabel(_caption(steps[0]), fontsize=7)
            figure.savefig(folder / name, dpi=150)
            written.append(folder / name)
    return written


def _caption(row: Record) -> str:
    date = str(row["started_at"])[:10]
    what = f"{row['device']} | {row['model']} {row['dtype']} | {date} | commit {row['commit'][:12]}"
    return "\n".join([what, *textwrap.wrap(row["command"], 150)])


def _label(row: Record) -> str:
    rate = row["forced_miss_rate"]
    return f"{row['baseline']}, {rate:.0%} dropped" if rate else row["baseline"]


def _throughput(figure: Any, rows: list[Record]) -> bool:
    rows = [r for r in rows if r["metric"] == "throughput"]
    contexts = sorted({r["context_len_tokens"] for r in rows})
    if not contexts:
        return False
    for axes, context in zip(figure.subplots(1, len(contexts), squeeze=False)[0], contexts, strict=True):
        lines: dict[str, list[Record]] = defaultdict(list)
        for row in rows:
            if row["context_len_tokens"] == context:
                lines[_label(row)].append(row)
        for label, line in lines.items():
            line.sort(key=lambda r: r["batch"])
            batch, speed = [r["batch"] for r in line], [r["p50"] for r in line]
            style = "o-" if line[0]["baseline"] == "rheo" else "s--"
            axes.plot(batch, speed, style, label=label)
            axes.fill_between(batch, [r["p20"] for r in line], [r["p80"] for r in line], alpha=0.2)
        axes.set(title=f"context {context:.0f} tokens", xlabel="batch", ylabel="tokens/s (p20, median, p80)")
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({r["batch"] for r in rows}))
        axes.legend()
    return True


def _split(figure: Any, rows: list[Record]) -> bool:
    """Stacked parts per case beside the whole step: the model, then the parts of attention and cache."""
    cases: dict[tuple[float, float], dict[str, float]] = defaultdict(dict)
    for row in rows:
        case = cases[row["context_len_tokens"], row["batch"]]
        if row["metric"].startswith("part."):
            case[row["metric"].removeprefix("part.")] = row["p50"]
        elif row["metric"] == "step" and not row["forced_miss_rate"]:
            case[row["baseline"]] = row["p50"]
    cases = {key: case for key, case in sorted(cases.items()) if "rheo" in case}
    if not cases:
        return False
    axes, names = figure.subplots(), [f"{context:.0f} x {batch:.0f}" for context, batch in cases]
    bottom = [0.0] * len(cases)
    found = [p for p in PARTS if any(p in case for case in cases.values())]
    base = "model" if any("model" in case for case in cases.values()) else "no-attention"
    for part in (base, *found):
        heights = [case.get(part, 0.0) for case in cases.values()]
        if any(heights):
            axes.bar(
                names,
                heights,
                bottom=bottom,
                label=LABELS.get(part, part),
            )
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.plot(names, [case["rheo"] for case in cases.values()], "k_", markersize=30, label="whole step")
    axes.set(title="Parts of a step", xlabel="context x batch", ylabel="ms per step")
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
    return True
