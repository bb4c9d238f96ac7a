"""Figures of a trace, and one HTML page that holds all of them and needs nothing from anywhere."""

import base64
import html
import importlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rheo_offload.errors import TraceError
from rheo_offload.trace.analysis import Analysis
from rheo_offload.trace.file import NO_BLOCK, Trace

__all__ = ["FIGURES", "REPORT", "selection_map", "write_report"]

REPORT = "report.html"
COLUMNS = 320
"""Widest image of a map, in pixels of data."""


def write_report(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw every figure into `folder` (made if need be) and write the page.

    Returns:
        The files written, the page last.

    Raises:
        TraceError: matplotlib is missing, or the folder cannot be written.
    """
    try:
        figure_of = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise TraceError("the report draws with matplotlib: install the [plot] extra") from error
    images: dict[str, bytes] = {}
    for name, (_, draw) in FIGURES.items():
        figure = figure_of(figsize=(10, 4.2), layout="constrained")
        draw(figure, analysis)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        images[name] = buffer.getvalue()
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in images.items():
            (folder / f"{name}.png").write_bytes(data)
            written.append(folder / f"{name}.png")
        (folder / REPORT).write_text(page(analysis, images), encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
    return [*written, folder / REPORT]


# ---- figures -----------------------------------------------------------------------------------------------------


def _miss_curve(figure: Any, analysis: Analysis) -> None:
    """Miss rate over capacity, a line per policy; once over all blocks, once without forced ones."""
    panels = zip(
        figure.subplots(1, 2), ("all selected blocks", "without sink and recent blocks"), strict=True
    )
    for i, (axes, title) in enumerate(panels):
        for policy in dict.fromkeys(found.policy for found in analysis.replays):
            line = [found for found in analysis.replays if found.policy == policy]
            rates = [100 * (1 - analysis.rates(found)[i]) for found in line]
            style = {"belady": "k^:", "lru": "ko-", "perfect": "g:"}.get(policy, "s-")
            axes.plot([found.ratio for found in line], rates, style, markersize=4, linewidth=1, label=policy)
        own = 100 * (1 - analysis.rates(analysis.run)[i])
        axes.plot([analysis.run.ratio], [own], "r*", markersize=10, label="the run")
        axes.set(title=title, xlabel="capacity / budget", ylabel="blocks fetched on demand, %")
        axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


def _over_time(figure: Any, analysis: Analysis) -> None:
    """Misses of the run per step, and where they fall: layers x KV heads."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    misses = analysis.trace.misses
    mean = misses.mean((0, 1, 2))
    left.plot(mean, linewidth=0.8, label="mean over layers, rows, heads")
    left.plot(np.percentile(misses, 95, axis=(0, 1, 2)), linewidth=0.5, alpha=0.7, label="95th percentile")
    left.set(title="misses of the run", xlabel="step", ylabel="blocks per (layer, row, KV head)")
    left.set_ylim(bottom=0)
    left.legend()
    per_head = misses[..., analysis.skip :].mean((1, 3))
    image = right.imshow(per_head, aspect="auto", origin="lower", interpolation="nearest", vmin=0)
    right.set(title="misses per step", xlabel="KV head", ylabel="layer")
    right.set_xticks(range(per_head.shape[1]))
    layers = analysis.trace.meta["layers"]
    shown = range(0, len(layers), max(1, len(layers) // 8))
    right.set_yticks(list(shown), [str(layers[i]) for i in shown])
    figure.colorbar(image, ax=right)


def selection_map(trace: Trace, row: int) -> NDArray[np.float64]:
    """Return how often the streams of a row select each block, [blocks, at most `COLUMNS`], 0 to 1.

    Columns are equal groups of neighbouring steps (the last one may be shorter); rows are blocks.
    """
    layers, _, heads, steps, _ = trace.ids.shape
    blocks = max(1, int(-(-trace.lens[:, row].max() // trace.meta["block_size"])))
    per_column = -(-steps // COLUMNS)
    found = np.zeros((blocks, -(-steps // per_column)))
    for column in range(found.shape[1]):
        ids = trace.ids[:, row, :, column * per_column : (column + 1) * per_column]
        count = np.bincount(ids[ids != NO_BLOCK].ravel(), minlength=blocks)
        found[:, column] = count / (layers * heads * ids.shape[2])
    return found


def _selection(figure: Any, analysis: Analysis) -> None:
    """Which blocks are selected when: the first row's, over all layers and heads."""
    share = selection_map(analysis.trace, 0)
    axes = figure.subplots()
    extent = (0, analysis.trace.steps, 0, share.shape[0])
    image = axes.imshow(
        share, aspect="auto", origin="lower", interpolation="nearest", extent=extent, vmin=0, vmax=1
    )
    axes.set(title="share of (layer, KV head) that select a block, row 0", xlabel="step", ylabel="block")
    figure.colorbar(image, ax=axes)


def _forecast(figure: Any, analysis: Analysis) -> None:
    """Exposed milliseconds and tokens/s over capacity, a line per batch."""
    left, right = figure.subplots(1, 2)
    for rows in dict.fromkeys(cost.rows for _, cost in analysis.forecasts):
        line = sorted(
            ((found.ratio, cost) for found, cost in analysis.forecasts if cost.rows == rows),
            key=lambda pair: pair[0],
        )
        ratios = [ratio for ratio, _ in line]
        left.plot(ratios, [cost.exposed_ms for _, cost in line], "o-", markersize=4, label=f"batch {rows}")
        right.plot(ratios, [cost.tokens_per_s for _, cost in line], "o-", markersize=4)
    left.set(title="transfer that nothing hides", xlabel="capacity / budget", ylabel="ms per step")
    right.set(title="decode", xlabel="capacity / budget", ylabel="tokens/s (forecast)")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    left.legend()


FIGURES: dict[str, tuple[str, Callable[[Any, Analysis], None]]] = {
    "miss_curve": ("How much capacity is enough", _miss_curve),
    "misses": ("When and where the run missed", _over_time),
    "selection": ("What was selected", _selection),
    "forecast": ("What a step would cost", _forecast),
}


# ---- the page ----------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: .2em .8em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
.note { color: #555; }
"""


def page(analysis: Analysis, images: dict[str, bytes]) -> str:
    """Return the HTML page, images inline."""
    trace = analysis.trace
    notes = {
        "miss_curve": "Hit rate per policy and capacity (without sink and recent blocks in brackets). belady and "
        "perfect know the future: they are bounds.",
        "forecast": f"lru, {analysis.assumptions()}. A model of a machine, not a measurement.",
    }
    tables = {"miss_curve": [analysis.hit_table()], "forecast": [analysis.forecast_table()]}
    parts = [
        f"<h1>Trace of {_text(trace.meta['model'])}</h1>",
        f"<p>{_text(trace.summary())}. {_text(analysis.check_line().capitalize())}.</p>",
    ]
    if trace.meta.get("stopped"):
        parts.append(f"<p>The recording ended early: {_text(trace.meta['stopped'])}.</p>")
    if analysis.skip:
        parts.append(f"<p>The first {analysis.skip} steps are left out of the figures.</p>")
    for name, (title, _) in FIGURES.items():
        inline = base64.b64encode(images[name]).decode()
        parts.append(f"<h2>{_text(title)}</h2>")
        parts.append(f'<img alt="{_text(title)}" src="data:image/png;base64,{inline}">')
        parts += [_table(rows) for rows in tables.get(name, [])]
        if name == "miss_curve":
            parts.append('<p class="note">Blocks over the link per (layer, row, KV head) and step:</p>')
            parts.append(_table(analysis.link_table()))
        if name in notes:
            parts.append(f'<p class="note">{_text(notes[name])}</p>')
    parts += ["<h2>Provenance</h2>", _table([["key", "value"], *_provenance(trace)])]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>rheo trace</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _provenance(trace: Trace) -> Iterator[list[str]]:
    for key, value in sorted(trace.meta.items()):
        if key == "versions":
            yield [key, ", ".join(f"{name} {version}" for name, version in value.items())]
        elif value is not None:
            yield [key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]


def _table(rows: list[list[str]]) -> str:
    head, *rest = rows
    lines = ["<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rest]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
