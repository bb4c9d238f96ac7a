"""Figures of an evaluation: every task's number over the budget, and where needles were found. Needs matplotlib."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rheo_offload.errors import RheoError
from rheo_offload.eval.log import Row
from rheo_offload.eval.setups import DENSE
from rheo_offload.eval.suite import TASKS

__all__ = ["figure_class", "write_plots"]


def figure_class() -> Any:
    """Return matplotlib's Figure.

    Raises:
        RheoError: it is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise RheoError(
            "--plots draws with matplotlib: install the [plot] extra, or leave --plots out"
        ) from error


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw into `folder` and return the files written: `quality.png`, and `needle.png` when there are needles.

    Raises:
        RheoError: matplotlib is missing, or there are no rows.
    """
    figure_of = figure_class()
    if not rows:
        raise RheoError("there are no rows to draw")
    figures = {"quality": _quality(figure_of, rows)}
    if any(row.task == "needle" for row in rows):
        figures["needle"] = _needles(figure_of, [row for row in rows if row.task == "needle"])
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def _quality(figure_of: Any, rows: Sequence[Row]) -> Any:
    """A panel per task: its number over the budget, a line per method, the stock model dashed."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = figure_of(figsize=(3.6 * len(tasks), 3.4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        of_task = [row for row in rows if row.task == task]
        for method in dict.fromkeys(row.method for row in of_task):
            own = [row for row in of_task if row.method == method]
            budgets = list(dict.fromkeys(row.token_budget for row in own))
            values = [
                TASKS[task].summary([row.metrics for row in own if row.token_budget == budget])
                for budget in budgets
            ]
            if method == DENSE:
                axes.axhline(values[0], color="black", linestyle="--", linewidth=1, label=method)
            else:
                axes.plot(budgets, values, "o-", markersize=4, linewidth=1, label=method)
        axes.set(title=task, xlabel="budget, tokens")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def _needles(figure_of: Any, rows: Sequence[Row]) -> Any:
    """A map per method and budget: share found, depth by context."""
    setups = list(dict.fromkeys((row.method, row.token_budget) for row in rows))
    contexts = sorted({row.context_len_tokens for row in rows})
    depths = sorted({_depth(row) for row in rows})
    figure = figure_of(figsize=(2.4 * len(setups) + 1, 2.8), layout="constrained")
    for axes, (method, budget) in zip(figure.subplots(1, len(setups), squeeze=False)[0], setups, strict=True):
        found = np.full((len(depths), len(contexts)), np.nan)
        for i, depth in enumerate(depths):
            for j, context in enumerate(contexts):
                cell = [
                    row.metrics["score"]
                    for row in rows
                    if (row.method, row.token_budget) == (method, budget)
                    and (_depth(row), row.context_len_tokens) == (depth, context)
                ]
                found[i, j] = np.mean(cell) if cell else np.nan
        image = axes.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(contexts)), [f"{c // 1024}K" if c >= 1024 else str(c) for c in contexts])
        axes.set_yticks(range(len(depths)), depths)
        axes.set(title=method if budget is None else f"{method}, {budget}", xlabel="context", ylabel="depth")
    figure.colorbar(image, ax=axes, label="found")
    return figure


def _depth(row: Row) -> str:
    return dict(part.split("=") for part in row.case.split())["depth"]
