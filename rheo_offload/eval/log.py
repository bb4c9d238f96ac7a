"""The log of an evaluation: one JSON record a line, appended as rows are done, read again to resume.

Three kinds of record: `run` (who, when, with what; one per start), `config` (of a method and budget) and `row`. A log
is continued only by an evaluation of the same model, numbers and configurations; else the difference is named.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rheo_offload.errors import RheoError

__all__ = ["EvalLog", "Key", "Row"]

FILE = "rows.jsonl"
Key = tuple[str, str, int | None, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case, answered by one method at one budget. What only an offloaded model has is None for `dense`."""

    task: str
    case: str
    method: str
    token_budget: int | None
    context_len_tokens: int
    metrics: dict[str, float]
    dense_question: dict[str, float] | None = None
    """The metrics when the question is read by the dense prefill instead of the decode path."""
    answer: str | None = None
    valid: bool | None = None
    """False when nothing was evicted and loaded again, so that the row proves nothing about offloading."""
    invalid_because: str | None = None
    decode_steps: int | None = None
    hit_rate: float | None = None
    hit_rate_unforced: float | None = None
    captured_mass_mean: float | None = None
    captured_mass_min: float | None = None
    output_error_mean: float | None = None
    output_error_max: float | None = None
    logit_kl_mean: float | None = None
    logit_kl_max: float | None = None
    selected_blocks: int | None = None
    miss_blocks: int | None = None
    evicted_blocks: int | None = None
    h2d_bytes: int | None = None
    warm_h2d_bytes: int | None = None
    prefill_h2d_bytes: int | None = None
    streamed_h2d_bytes: int | None = None
    audit_h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    device_kv_bytes: int | None = None
    dense_kv_bytes: int | None = None
    seconds: float = 0.0
    """Wall clock of the case, prefill included."""

    @property
    def key(self) -> Key:
        """What a row is identified by."""
        return self.task, self.method, self.token_budget, self.case


class EvalLog:
    """`rows.jsonl` in a directory; see the module."""

    def __init__(
        self,
        directory: Path,
        *,
        run: Mapping[str, Any],
        configs: Mapping[tuple[str, int | None], Mapping[str, Any]],
    ) -> None:
        """Read what is there and check that it may be continued; nothing is written yet.

        Args:
            directory: made with the first record if need be.
            run: what the log says about this start; `run["identity"]` must be that of the starts before.
            configs: (method, budget) -> its configuration as a dictionary.

        Raises:
            RheoError: the file holds something else, cannot be read, or is of another model, seed or configuration.
        """
        self.file = directory / FILE
        self.rows: dict[Key, Row] = {}
        self._run, self._started = dict(run), False
        self._configs = {key: _plain(config) for key, config in configs.items()}
        self._known: dict[tuple[str, int | None], Any] = {}
        self._cut: int | None = None  # length in bytes without a line that was torn
        for number, record in enumerate(self._read(), 1):
            self._take(number, record)

    def append(self, row: Row) -> None:
        """Write a row, and before the first one what this start is."""
        if not self._started:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._write({"record": "run", **self._run})
            self._started = True
        config = (row.method, row.token_budget)
        if config in self._configs and config not in self._known:
            self._known[config] = self._configs[config]
            self._write(
                {
                    "record": "config",
                    "method": config[0],
                    "token_budget": config[1],
                    "config": self._configs[config],
                }
            )
        self._write({"record": "row", **asdict(row)})
        self.rows[row.key] = row

    def _read(self) -> list[dict[str, Any]]:
        try:
            text = self.file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise RheoError(f"cannot read {str(self.file)!r}: {error}") from error
        whole, _, torn = text.rpartition("\n")
        if torn:  # the process died while it wrote this line; it is dropped once there is a row to write
            self._cut = len((whole + "\n").encode()) if whole else 0
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError as error:
            raise self._refusal(f"holds a line that is not JSON ({error.msg})") from error

    def _write(self, record: dict[str, Any]) -> None:
        if self._cut is not None:
            with self.file.open("r+b") as file:
                file.truncate(self._cut)
            self._cut = None
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _take(self, number: int, record: Any) -> None:
        kind = record.pop("record", None) if isinstance(record, dict) else None
        if kind == "run":
            self._compare("", record["identity"], _plain(self._run["identity"]))
        elif kind == "config":
            key = (record["method"], record["token_budget"])
            if key in self._configs:
                what = f"{key[0]} at {key[1]} tokens: "
                self._compare(what, record["config"], self._configs[key])
            self._known[key] = record["config"]
        elif kind == "row":
            try:
                row = Row(**record)
            except TypeError as error:
                raise self._refusal(f"has a row of another version in line {number} ({error})") from error
            self.rows[row.key] = row
        else:
            raise self._refusal(f"holds something else than records of an evaluation in line {number}")

    def _compare(self, what: str, before: Any, now: Any) -> None:
        for path, old, new in _differences(before, now):
            raise self._refusal(f"was made with another {what}{path} ({old!r}, now {new!r})")

    def _refusal(self, why: str) -> RheoError:
        return RheoError(f"{self.file} {why}; give another --out, or continue it as it was begun")


def _plain(value: Any) -> Any:
    """Return a value as it comes back from a file."""
    return json.loads(json.dumps(value))


def _differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Return (path, old, new) of every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        found = [_differences(before.get(k), now.get(k), f"{path}.{k}" if path else k) for k in keys]
        return [difference for part in found for difference in part]
    return [] if before == now else [(path, before, now)]
