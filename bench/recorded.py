"""Block ids that a real model selected, step by step: the file, and how its streams fill another geometry.

A *stream* is one (text, layer, KV head) of the recorded model. A file holds one policy (budget, heat share) and is
made by `bench/record.py`. `docs/prefetch.md` says what was recorded and what the ids can and cannot stand for.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rheo_offload.trace.mapping import start_steps, stream_map

__all__ = ["Recording"]

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recording:
    """Selected blocks of every stream and step.

    Attributes:
        base: uint16 [streams, recorded_steps, S], logical block ids, ascending.
        early: uint16 [streams, recorded_steps, A], ascending: those of `base` that were certain a step before,
            whatever the query: the A hottest blocks that are not forced (A = `agnostic_blocks`; 0 without heat).
        start_order: uint16 [streams, blocks before the first step], the blocks after the prompt, hottest first.
        meta: JSON-ready: `start_tokens` (tokens before the first step), `block_size`, `sink_blocks`,
            `recent_blocks`, `query_blocks`, `agnostic_blocks`, `heat_decay`, `streams` (one [text, layer, head]
            each) and where it comes from.
    """

    base: NDArray[np.uint16]
    early: NDArray[np.uint16]
    start_order: NDArray[np.uint16]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        if self.meta.get("format") != FORMAT:
            raise ValueError(f"recording of format {self.meta.get('format')}, this code reads {FORMAT}")
        streams = len(self.meta["streams"])
        shapes = [self.base.shape[0], self.early.shape[0], self.start_order.shape[0]]
        if shapes != [streams] * 3 or self.base.shape[:2] != self.early.shape[:2]:
            raise ValueError(f"recording names {streams} streams, its arrays hold {shapes}")

    # ---- the file --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recording.

        Raises:
            ValueError: not there, or not a recording of this format.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                arrays = {name: file[name] for name in ("base", "early", "start_order")}
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a recording that `bench record` wrote") from error
        return cls(**arrays, meta=meta)

    def save(self, path: str | Path) -> None:
        """Write a recording; an existing file is replaced."""
        np.savez_compressed(
            path, base=self.base, early=self.early, start_order=self.start_order, meta=json.dumps(self.meta)
        )

    # ---- what it holds ---------------------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """Number of streams."""
        return self.base.shape[0]

    @property
    def recorded_steps(self) -> int:
        """Number of recorded decode steps."""
        return self.base.shape[1]

    @property
    def block_budget(self) -> int:
        """S, blocks selected per step."""
        return self.base.shape[2]

    @property
    def context_blocks(self) -> int:
        """Blocks a row has after the last recorded step; every id is below it."""
        tokens = self.meta["start_tokens"] + self.recorded_steps
        return -(-tokens // self.meta["block_size"])

    # ---- another geometry ------------------------------------------------------------------------------------------

    def times(self, rows: int, steps: int) -> NDArray[np.int32]:
        """Return the recorded step that every row plays at every step, [steps, rows].

        Rows begin at different places (a hash of the row), so that they are not in lockstep. Up to half of the
        recording a row plays forward only; longer runs turn round at both ends and play backward, so that
        neighbouring steps are always neighbours of the recording.
        """
        recorded = self.recorded_steps
        choices = recorded - steps + 1 if 2 * steps <= recorded else recorded
        at = start_steps(rows, choices)[None] + np.arange(steps)[:, None]
        turn = max(1, 2 * recorded - 2)
        at %= turn
        return np.where(at < recorded, at, turn - at).astype(np.int32)

    def stream_map(self, num_layers: int, num_kv_heads: int, rows: int) -> NDArray[np.int32]:
        """Return the stream that every (layer, row, KV head) plays, [num_layers, rows, num_kv_heads].

        A hash of the three numbers: neighbours play different layers and texts, and more rows leave the first ones as
        they are. All heads of a row are at the same step of their streams (`times`).
        """
        return stream_map(self.streams, num_layers, num_kv_heads, rows)

    def index_map(self, num_layers: int, num_kv_heads: int, rows: int, steps: int) -> NDArray[np.int32]:
        """Return int32 [steps, num_layers, rows, num_kv_heads], indices into `base.reshape(-1, S)` (and `early`).

        The lean form for a device: `base` is a few hundred KB whatever the geometry, and
        `base.reshape(-1, S)[index_map[step, layer]]` are the ids of a layer.
        """
        stream = self.stream_map(num_layers, num_kv_heads, rows)[None]
        return stream * np.int32(self.recorded_steps) + self.times(rows, steps)[:, None, :, None]

    def ids(self, num_layers: int, num_kv_heads: int, rows: int, steps: int) -> NDArray[np.int32]:
        """Return the selected ids, int32 [steps, num_layers, rows, num_kv_heads, S], ascending."""
        index = self.index_map(num_layers, num_kv_heads, rows, steps)
        return self.base.reshape(-1, self.block_budget)[index].astype(np.int32)

    def early_ids(self, num_layers: int, num_kv_heads: int, rows: int, steps: int) -> NDArray[np.int32]:
        """Return `early`, mapped like `ids`: int32 [steps, num_layers, rows, num_kv_heads, A].

        Entry t is part of `ids` at t and may be fetched as soon as step t - 1 is done.
        """
        index = self.index_map(num_layers, num_kv_heads, rows, steps)
        return self.early.reshape(-1, self.early.shape[2])[index].astype(np.int32)

    def seq_lens(self, rows: int, steps: int) -> NDArray[np.int32]:
        """Return the tokens each row had in the recording, this step's included, int32 [steps, rows].

        A run that keeps its own lengths instead must keep every row at `context_blocks` blocks or more; the blocks
        forced as recent are then those of the recording, not the run's own last ones.
        """
        return self.times(rows, steps) + np.int32(self.meta["start_tokens"] + 1)
