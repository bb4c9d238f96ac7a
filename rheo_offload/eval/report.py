"""The rows of an evaluation as Markdown tables: one per task, and one of methods x budgets over all tasks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rheo_offload.eval.log import Row
from rheo_offload.eval.setups import DENSE
from rheo_offload.eval.suite import TASKS

__all__ = ["markdown", "method_table", "row_line", "task_tables"]

MIB = 1 << 20
MARK = "†"
NOTE = (
    f"{MARK} in some of these rows no block was evicted and loaded again: they say what the selection costs, and "
    "nothing about offloading."
)
PARTS = {
    "needle": ("score",),
    "ruler": ("score",),
    "json": ("fields", "records", "parsed"),
    "long_generation": ("score", "first_difference", "repetition"),
    "perplexity": ("perplexity", "accuracy"),
    "kl": ("kl", "kl_p95", "kl_max", "agreement"),
    "recall": ("score", "retrieval", "tracking", "copying"),
}
TITLES = {
    "needle": "found",
    "ruler": "RULER",
    "json": "JSON fields",
    "long_generation": "long agreement",
    "perplexity": "perplexity",
    "kl": "KL, nats",
    "recall": "recalled",
    "score": "score",
}


def row_line(row: Row) -> str:
    """Return a row as one line for people."""
    where = f"{row.task:<15} {row.method:<12} {row.token_budget or '-':>6}  {row.case}"
    numbers = "  ".join(f"{key} {value:.4g}" for key, value in row.metrics.items() if key in PARTS[row.task])
    if row.dense_question is not None:
        numbers += f"  (question prefilled: {row.dense_question['score']:.4g})"
    if row.decode_steps is None:
        return f"{where}  {numbers}"
    assert row.selected_blocks is not None and row.miss_blocks is not None and row.h2d_bytes is not None
    hits = row.selected_blocks - row.miss_blocks
    moved = f"{row.h2d_bytes / MIB:.1f} MiB loaded, {hits} hits, {row.miss_blocks} misses"
    moved += f", {row.evicted_blocks} evictions"
    return f"{where}  {numbers}  {moved}" + ("" if row.valid else f"  INVALID: {row.invalid_because}")


def task_tables(rows: Sequence[Row]) -> str:
    """Return one Markdown table per task: a line per method and budget."""
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        names = PARTS[task]
        asked = TASKS[task].prefills_question
        head = ["method", "budget", *(TITLES.get(name, name.replace("_", " ")) for name in names)]
        head += ["question prefilled"] if asked else []
        head += [*_locality_head(rows), "hits", "misses", "evictions", "cases"]
        lines = []
        for (method, budget), group in _groups(of_task).items():
            cells = [_average(group, task, name) for name in names]
            if asked:
                beside = [row.dense_question for row in group if row.dense_question is not None]
                cells.append(_number(TASKS[task].summary(beside)) if beside else "")
            lines.append([method, _budget(budget), *cells, *_locality(group, rows), *_counts(group)])
        parts.append(f"### {task}\n\n{_markdown(head, lines)}")
    return "\n\n".join(parts)


def method_table(rows: Sequence[Row]) -> str:
    """Return one Markdown table over all tasks: a line per method and budget."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    head = ["method", "budget", *_locality_head(rows), *(TITLES[task] for task in tasks)]
    lines = []
    for (method, budget), group in _groups(rows).items():
        cells = []
        for task in tasks:
            of_task = [row for row in group if row.task == task]
            mark = MARK if any(row.valid is False for row in of_task) else ""
            cells.append(_headline(task, of_task) + mark if of_task else "")
        lines.append([method, _budget(budget), *_locality(group, rows), *cells])
    return _markdown(head, lines)


def markdown(rows: Sequence[Row], *, about: Mapping[str, Any]) -> str:
    """Return the whole report: what was run, the table over all tasks, and one per task."""
    told = "\n".join(f"- {name}: {value}" for name, value in about.items())
    note = f"\n\n{NOTE}" if any(row.valid is False for row in rows) else ""
    return f"# Evaluation\n\n{told}\n\n{method_table(rows)}{note}\n\n{task_tables(rows)}\n"


def _groups(rows: Iterable[Row]) -> dict[tuple[str, int | None], list[Row]]:
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.method != DENSE):
        groups.setdefault((row.method, row.token_budget), []).append(row)
    return groups


def _headline(task: str, group: Sequence[Row]) -> str:
    return _number(TASKS[task].summary([row.metrics for row in group]))


def _average(group: Sequence[Row], task: str, name: str) -> str:
    """The task's own summary for its headline; else the mean of the cases that have it, or of what they asked of it."""
    if name in (task, "score", "fields"):
        return _headline(task, group)
    found = [row.metrics for row in group if name in row.metrics]
    weights = [metrics.get(f"{name}_questions", 1.0) for metrics in found]
    total = sum(weight * metrics[name] for weight, metrics in zip(weights, found, strict=True))
    return _number(total / sum(weights)) if found else ""


def _locality_head(rows: Sequence[Row]) -> list[str]:
    """The columns of `_locality`; the divergence of the logits where a row has it (`audit.logits`)."""
    measured = any(row.logit_kl_mean is not None for row in rows)
    return ["captured mass", *(["logit KL"] if measured else []), "hit rate", "KiB / token"]


def _locality(group: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Captured mass, hit rate, and bytes loaded on demand per decode step, of a group of all the rows of a table."""
    head = _locality_head(rows)
    measured = [row for row in group if row.decode_steps]
    if not measured:
        return [""] * len(head)
    masses = [row.captured_mass_mean for row in measured if row.captured_mass_mean is not None]
    divergences = [row.logit_kl_mean for row in measured if row.logit_kl_mean is not None]
    selected, missed = _sum(measured, "selected_blocks"), _sum(measured, "miss_blocks")
    per_token = _sum(measured, "h2d_bytes") / _sum(measured, "decode_steps") / 1024
    return [
        f"{sum(masses) / len(masses):.3f}" if masses else "",
        *(
            [_number(sum(divergences) / len(divergences)) if divergences else ""]
            if "logit KL" in head
            else []
        ),
        f"{1 - missed / selected:.4f}" if selected else "",
        f"{per_token:.1f}",
    ]


def _counts(group: Sequence[Row]) -> list[str]:
    """Hits, misses, evictions, and how many cases there are, the invalid ones named."""
    invalid = sum(row.valid is False for row in group)
    cases = f"{len(group)}" + (f" ({invalid} invalid{MARK})" if invalid else "")
    if all(row.decode_steps is None for row in group):
        return ["", "", "", cases]
    selected, missed = _sum(group, "selected_blocks"), _sum(group, "miss_blocks")
    return [f"{selected - missed:,}", f"{missed:,}", f"{_sum(group, 'evicted_blocks'):,}", cases]


def _sum(group: Sequence[Row], name: str) -> int:
    return sum(getattr(row, name) or 0 for row in group)


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _budget(budget: int | None) -> str:
    return "" if budget is None else f"{budget}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
