"""One row per case and metric, the same columns in every results file."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

Status = Literal["ok", "wrong", "oom", "unsupported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The columns every row of a run shares: where and how it ran."""

    device: str
    cpu: str
    torch: str
    triton: str
    numba: str
    transformers: str
    commit: str
    dirty: str
    """`true`, `false`, or `unknown` outside a git checkout."""
    started_at: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of one case. None is an empty field: not measured, or meaningless for this subject."""

    suite: str
    case_id: str
    metric: str
    unit: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    n: int = 0
    status: Status = "ok"
    baseline: str = ""
    """What ran: `rheo`, or the name of the baseline."""
    bytes_moved: float | None = None
    """Bytes over the link, both directions, per step or call."""
    flops: float | None = None
    floor_ms: float | None = None
    frac_of_floor: float | None = None
    """floor_ms / time; 1.0 = at the limit of the memory."""
    link_floor_ms: float | None = None
    """Host-to-device bytes over the link's measured rate, apart from floor_ms."""
    noise_frac: float | None = None
    """Spread of the medians of the rounds over their mean: smaller differences mean nothing."""
    model: str = ""
    dtype: str = ""
    batch: int | None = None
    context_len_tokens: int | None = None
    block_size: int | None = None
    token_budget: int | None = None
    cpu_share: float | None = None
    method: str = ""
    fill: str = ""
    forced_miss_rate: float | None = None
    hit_rate: float | None = None
    hit_rate_unforced: float | None = None
    """The same without sink and recent blocks, which nearly always hit."""
    missed_blocks: float | None = None
    """Selected but absent blocks per step, all rows, layers and heads."""
    evicted_blocks: float | None = None
    captured_mass: float | None = None
    device_kv_bytes: int | None = None
    weight_bytes: int | None = None
    """All parameters and buffers of the model; part of `peak_device_bytes`."""
    peak_device_bytes: int | None = None
    target: float | None = None
    """What the metric should reach, in its unit."""
    target_met: str = ""
    """`true` or `false`; empty without a target."""
    note: str = ""
    """What the numbers do not say: which attention ran, what was shared, what capped the batch."""
    error: str = ""


COLUMNS = [f.name for f in fields(Row)] + [f.name for f in fields(Environment)]
TEXT = {f.name for owner in (Row, Environment) for f in fields(owner) if f.type in (str, Status)}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def write_rows(path: Path, rows: Sequence[Row], environment: Environment) -> None:
    """Write the CSV, header included; an existing file is replaced."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: _text(value) for name, value in (asdict(row) | asdict(environment)).items()}
            )


def read_rows(path: Path) -> list[dict[str, str | float | None]]:
    """Read a CSV of `write_rows`: text columns as text, numbers as floats, empty numbers as None.

    Columns that an older file lacks are empty.

    Raises:
        ValueError: a column is not this schema's.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if odd := sorted(set(reader.fieldnames or []) - set(COLUMNS)):
            raise ValueError(f"{path} is not of this schema: columns {odd}")
        rows = [{name: row.get(name, "") for name in COLUMNS} for row in reader]
    return [
        {name: text if name in TEXT else (float(text) if text else None) for name, text in row.items()}
        for row in rows
    ]
