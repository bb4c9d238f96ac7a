"""Tables and figure of a locality run, from its rows.csv and nothing else."""

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.locality_streams import MEAN_KEY
from bench.schema import read_rows

__all__ = ["FIGURE", "TABLE", "draw", "records", "tables", "write"]

TABLE, FIGURE = "table.md", "locality.png"
SHARE, DECAY, CAPACITY, HEAT = 0.5, 0.98, 1.5, "scores"
"""Today's defaults, which the tables hold still while another setting changes."""
CELL = "recall, hits, KiB a token, pointed attention (if any) found"
Record = dict[str, Any]


def records(folder: Path) -> list[Record]:
    """Return the rows of a run, and as numbers what their note says: share, decay, capacity, pointed (or None)."""
    found: list[Record] = []
    for row in read_rows(folder / "rows.csv"):
        said = dict(part.split("=") for part in str(row["note"]).split())
        blocks = int(float(row["token_budget"] or 0) / float(row["block_size"] or 1))
        found.append(
            row
            | {
                "share": float(said["share"]),
                "capacity": float(said["capacity"]),
                "decay": float(said["decay"]) if said["decay"] else None,
                "heat": said["heat"],
                "pointed": float(said["pointed"]) if said.get("pointed") else None,
                "shape": (str(row["method"]), int(row["block_size"] or 0), blocks),
            }
        )
    return found


def write(folder: Path) -> list[Path]:
    """Write the tables and, with matplotlib, the figure; returns the files."""
    rows = records(folder)
    path = folder / TABLE
    path.write_text("\n".join(tables(rows)), encoding="utf-8")
    return [path, *filter(None, [draw(rows, folder)])]


def tables(rows: list[Record]) -> Iterator[str]:
    """Yield the lines of the Markdown report."""
    yield "Target: hits of 0.98 or more with 0.99 or more of the recall at share 0, same budget.\n"
    yield f"Cases (block size x budget) that meet the target, pool {CAPACITY:g}x:\n"
    yield from _table(
        [r for r in rows if r["capacity"] == CAPACITY],
        label=lambda r: (r["method"], r["heat"], r["decay"], r["share"]),
        cell=lambda found: f"{sum(r['target_met'] == 'true' for r in found)} of {len(found)}",
        head="method, heat, decay, share",
    )
    for shape in sorted({r["shape"] for r in rows}):
        yield from _shape_tables([r for r in rows if r["shape"] == shape], *shape)
    yield f"\nDecay, share {SHARE:g}, pool {CAPACITY:g}x, mean over the above: {CELL}:\n"
    yield from _table(
        [r for r in rows if _same(r, share=SHARE, capacity=CAPACITY)],
        label=lambda r: (r["method"], r["heat"], r["decay"]),
        cell=_figures,
        head="method, heat, decay",
    )


def _shape_tables(rows: list[Record], method: str, size: int, blocks: int) -> Iterator[str]:
    """Yield the tables of one way to rank blocks, one block size and one budget."""
    yield f"\n{method}, {blocks} blocks of {size} tokens, decay {DECAY:g}, pool {CAPACITY:g}x: {CELL}:\n"
    yield from _table(
        [r for r in rows if r["capacity"] == CAPACITY and r["decay"] in (DECAY, None)],
        label=lambda r: (r["heat"], r["share"]),
        cell=_figures,
        head="heat, share",
    )
    yield f"\nThe same, share {SHARE:g} by scores, over pool sizes: hits (without sink and recent blocks):\n"
    yield from _table(
        [r for r in rows if _same(r, share=SHARE, heat=HEAT, decay=DECAY)],
        label=lambda r: (r["capacity"],),
        cell=lambda found: f"{found[0]['hit_rate']:.3f} ({found[0]['hit_rate_unforced']:.3f})",
        head="pool",
    )


def _same(row: Record, **wanted: object) -> bool:
    return all(row[name] == value for name, value in wanted.items())


def _figures(found: list[Record]) -> str:
    recall, hits, moved = (
        sum(r[name] for r in found) / len(found) for name in ("captured_mass", "hit_rate", "bytes_moved")
    )
    met = all(r["target_met"] == "true" for r in found)
    pointed = [r["pointed"] for r in found if r["pointed"] is not None]
    text = f"{recall:.3f}, {hits:.3f}, {moved / 1024:.0f}"
    text += f", {sum(pointed) / len(pointed):.3f}" if pointed else ""
    return f"**{text}**" if met else text


def _table(
    rows: Iterable[Record],
    *,
    label: Callable[[Record], tuple[Any, ...]],
    cell: Callable[[list[Record]], str],
    head: str,
) -> Iterator[str]:
    """Yield a table: a line per label in the order of the rows, a column per text."""
    grouped: dict[tuple[Any, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        grouped[label(row)][row["fill"]].append(row)
    texts = list(dict.fromkeys(text for by_text in grouped.values() for text in by_text))
    yield f"| {head} | " + " | ".join(texts) + " |"
    yield "|---|" + "---|" * len(texts)
    for key, by_text in sorted(grouped.items(), key=lambda item: [str(part) for part in item[0]]):
        name = ", ".join("-" if part is None else str(part) for part in key)
        yield (
            f"| {name} | "
            + " | ".join(cell(by_text[text]) if text in by_text else "" for text in texts)
            + " |"
        )


def draw(rows: list[Record], folder: Path) -> Path | None:
    """Draw recall over misses, a panel per text and a line per heat and pool: the largest budget, its smallest blocks.

    Where a model's own ranking was replayed too, it is the one that is drawn.

    Returns:
        The file, or None without matplotlib.
    """
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        return None
    shape = max((r["shape"] for r in rows), key=lambda s: (s[0] != MEAN_KEY.method, s[1] * s[2], -s[1]))
    method, size, blocks = shape
    rows = [r for r in rows if r["shape"] == shape and r["decay"] in (DECAY, None)]
    texts = list(dict.fromkeys(r["fill"] for r in rows))
    columns = 2 if len(texts) == 4 else min(3, len(texts))
    lines = -(-len(texts) // columns)
    figure = figure_class(figsize=(4.3 * columns, 1.2 + 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, text in zip(grid, texts, strict=False):
        _panel(axes, [r for r in rows if r["fill"] == text])
        axes.set(title=text, xscale="log")
        axes.tick_params(axis="x", which="minor", labelbottom=False)  # they overlap
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.supylabel("recall of attention mass", fontsize=9)
    figure.suptitle(
        f"{rows[0]['model']}, {method}, {blocks} blocks of {size}: recall over the missed share of the selected blocks "
        "(line: 0.02); from right to left the query-agnostic share grows",
        fontsize=8,
    )
    figure.savefig(folder / FIGURE, dpi=110)
    return folder / FIGURE


def _panel(axes: Any, rows: list[Record]) -> None:
    """Draw one text: a line per heat and pool, a point per share (share 0 has no heat and begins both)."""
    for heat, style in (("scores", "o-"), ("attention", "s--"), ("bias", "^:")):
        if heat not in (r["heat"] for r in rows):
            continue
        for color, capacity in enumerate(sorted({r["capacity"] for r in rows})):
            line = [r for r in rows if r["capacity"] == capacity and r["heat"] in (heat, "none")]
            line.sort(key=lambda r: r["share"])
            axes.plot(
                [1 - r["hit_rate"] for r in line], [r["captured_mass"] for r in line], style,
                color=f"C{color}", markersize=4, linewidth=0.9, label=f"heat from {heat}, pool {capacity:g}x",
            )  # fmt: skip
    axes.axvline(0.02, color="0.7", linewidth=0.8)
