"""A trace: which blocks a run selected, step by step, and the file it is kept in (`docs/trace.md` has the format)."""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from rheo_offload.errors import TraceError
from rheo_offload.model.specs import config_hash

__all__ = ["FORMAT", "NO_BLOCK", "Trace", "config_hash"]

FORMAT = 1
NO_BLOCK = 65535
_NUMBERS = (
    "block_size",
    "block_budget",
    "sink_blocks",
    "recent_blocks",
    "query_blocks",
    "agnostic_blocks",
    "heat_decay",
    "capacity",
    "block_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """T steps of L layers, R rows, H KV heads; S blocks selected, N blocks before the first step.

    Attributes:
        ids: uint16 [L, R, H, T, S], logical block ids, ascending, `NO_BLOCK` behind the last.
        lens: int32 [T, R], tokens of a row, the step's own included; 0 = the row sat the step out.
        misses: uint16 [L, R, H, T], what the run itself missed.
        start_used: uint16 [L, R, H, N], residency before the first step: 0 = absent, 1 = used longest ago.
        start_order: uint16 [L, R, H, N], blocks before the first step, hottest first, `NO_BLOCK` behind.
        meta: JSON-ready: `layers` (their numbers), the numbers of the policy, `capacity` (slots per row and KV head),
            `block_bytes`, `model`, `config_hash`, `versions` and where the trace comes from.
    """

    ids: NDArray[np.uint16]
    lens: NDArray[np.int32]
    misses: NDArray[np.uint16]
    start_used: NDArray[np.uint16]
    start_order: NDArray[np.uint16]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse what does not fit together.

        Raises:
            TraceError: with what is wrong.
        """
        missing = [name for name in (*_NUMBERS, "layers", "model", "config_hash") if name not in self.meta]
        if missing:
            raise TraceError(f"the trace does not say {', '.join(missing)}")
        wrong = [name for name in _NUMBERS if not _is_number(self.meta[name], name)]
        if wrong:
            raise TraceError(f"the trace has no sensible {', '.join(wrong)}")
        layers, rows, heads, steps, budget = self.ids.shape if self.ids.ndim == 5 else (0,) * 5
        wanted = {
            "ids": (len(self.meta["layers"]), rows, heads, steps, self.meta["block_budget"]),
            "lens": (steps, rows),
            "misses": (layers, rows, heads, steps),
            "start_used": (layers, rows, heads, self.start_order.shape[-1]),
            "start_order": (layers, rows, heads, self.start_order.shape[-1]),
        }
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise TraceError(f"the trace's {name} is {getattr(self, name).shape}, not {shape}")
            if getattr(self, name).dtype.kind not in "iu":
                raise TraceError(f"the trace's {name} holds {getattr(self, name).dtype}, not whole numbers")
        if not self.ids.size:
            raise TraceError("the trace holds no step")
        blocks = -(-self.lens.T[None, :, None, :, None] // self.meta["block_size"])
        known = (self.ids < blocks) | (self.ids == NO_BLOCK)
        known_first = (self.start_order < self.start_order.shape[-1]) | (self.start_order == NO_BLOCK)
        if not (known.all() and known_first.all()):
            raise TraceError("the trace names blocks that its rows do not have")

    @property
    def steps(self) -> int:
        """Recorded decode steps."""
        return self.ids.shape[3]

    @property
    def streams(self) -> int:
        """Layers x rows x KV heads, in this order."""
        return int(np.prod(self.ids.shape[:3]))

    def summary(self) -> str:
        """Return one line: what was recorded."""
        layers, rows, heads, steps, budget = self.ids.shape
        return (
            f"{self.meta['model']}: {steps} steps x {layers} layers x {rows} row(s) x {heads} KV heads, "
            f"{budget} blocks of {self.meta['block_size']} tokens selected"
        )

    def check_config(self, config: PreTrainedConfig) -> None:
        """Refuse to be taken for a trace of another model.

        Raises:
            TraceError: the config differs from the one that was recorded.
        """
        found = config_hash(config)
        if found != self.meta["config_hash"]:
            raise TraceError(
                f"this is a trace of {self.meta['model']} (config {self.meta['config_hash']}), not of a "
                f"{config.model_type} model with config {found}"
            )

    # ---- the file --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the trace; an existing file is replaced.

        Raises:
            TraceError: it cannot be written.
        """
        arrays = {name: getattr(self, name) for name in self._arrays()}
        arrays["ids"] = _time_deltas(self.ids)
        meta = json.dumps({**self.meta, "format": FORMAT}, sort_keys=True)
        try:
            with open(path, "wb") as file:  # savez would put another suffix behind a name without .npz
                np.savez_compressed(file, **arrays, meta=np.array(meta))
        except OSError as error:
            raise TraceError(f"cannot write {str(path)!r}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a trace.

        Raises:
            TraceError: not there, not a trace, truncated, or of another format version.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                held = {name: file[name] for name in file.files}
        except OSError as error:
            if error.strerror is None:
                raise TraceError(f"{str(path)!r} is no trace, or truncated") from error
            raise TraceError(f"cannot read {str(path)!r}: {error.strerror}") from error
        except (ValueError, TypeError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
            raise TraceError(
                f"{str(path)!r} is no trace that `rheo trace record` wrote, or truncated"
            ) from error
        try:
            meta = json.loads(str(held.pop("meta")))
            version = meta.pop("format")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TraceError(f"{str(path)!r} is an npz file, but no trace") from error
        if version != FORMAT:
            raise TraceError(f"{str(path)!r} has format {version}, this version reads {FORMAT}")
        absent = [name for name in cls._arrays() if name not in held]
        if absent:
            raise TraceError(f"{str(path)!r} lacks {', '.join(absent)}")
        held["ids"] = np.cumsum(held["ids"], axis=-2, dtype=np.uint16)
        return cls(**{name: held[name] for name in cls._arrays()}, meta=meta)

    @staticmethod
    def _arrays() -> tuple[str, ...]:
        return "ids", "lens", "misses", "start_used", "start_order"


def _is_number(value: Any, name: str) -> bool:
    kind = float if name == "heat_decay" else int
    least = 1 if name in ("block_size", "block_budget", "capacity", "block_bytes") else 0
    return isinstance(value, int | kind) and not isinstance(value, bool) and least <= value < 2**31


def _time_deltas(ids: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Return the difference to the step before, modulo 2^16: mostly zeros, which compress."""
    first = np.zeros_like(ids[..., :1, :])
    return np.diff(ids, axis=-2, prepend=first)
