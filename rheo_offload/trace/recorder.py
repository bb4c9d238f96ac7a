"""Record what a run of one's own selects: `with record(model) as recorder: model.generate(...)`.

Every decode step appends to a ring on the device, at a place that a counter on the device names, so that captured
steps record like eager ones and nothing waits inside a step. When the ring is full the host empties it, between two
steps. Attaching and detaching ends captured steps (they are captured again).
"""

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import rheo_offload
from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.errors import TraceError
from rheo_offload.execution.executor import Executor
from rheo_offload.execution.workspace import DecodeWorkspace
from rheo_offload.model.hf_cache import RheoCache
from rheo_offload.model.offload import RheoHandle
from rheo_offload.trace.file import NO_BLOCK, Trace, config_hash

__all__ = ["Recorder", "record"]

logger = logging.getLogger("rheo_offload")

RING_BYTES = 32 << 20
RING_STEPS = 256


@contextmanager
def record(target: Any, cache: RheoCache | None = None) -> Iterator["Recorder"]:
    """Record the decode steps of a run; `recorder.trace()` is it, inside the block and after it.

    One run: the first cache of the model that decodes inside the block, and of it the steps that follow each other.
    When its rows change otherwise than by a token each (another turn, beams, rows of an engine that come and go), the
    recording ends there and says why (`meta["stopped"]`, and one log line).

    Args:
        target: an offloaded model.
        cache: the cache to watch, when it holds a prompt already; None: the next one that is made.

    Raises:
        TraceError: the model is not offloaded.
        CacheError: the cache is not one of this model.
    """
    handle = target.__dict__.get("rheo")
    if not isinstance(handle, RheoHandle):
        raise TraceError("only an offloaded model can be recorded: call offload(model) first")
    recorder = Recorder(handle)
    before = handle.on_executor
    if cache is not None and not handle.check_cache(cache).is_empty:
        recorder.attach(cache.executor)
    else:
        handle.on_executor = recorder.attach
    try:
        yield recorder
    finally:
        handle.on_executor = before
        recorder.detach()


class Recorder:
    """A `StepObserver` over one executor. Device: ids int16 and misses int16 of K steps, lengths, a counter."""

    def __init__(self, handle: RheoHandle) -> None:
        """Prepare to record a run of the handle's model."""
        self._handle = handle
        self._executor: Executor | None = None
        self._layers: dict[int, int] = {}  # layer_idx -> place in the ring
        self._parts: list[tuple[NDArray[Any], ...]] = []
        self._start: tuple[NDArray[np.uint16], NDArray[np.uint16]] | None = None
        self._queued = self._drained = 0
        self._expected: list[tuple[int, int | None]] | None = None
        self._shape: tuple[int, int] | None = None
        self.stopped: str | None = None
        """Why the recording ended before the run did."""

    def attach(self, ex: Executor) -> None:
        """Look on at an executor's steps; only at the first one's."""
        if self._executor is not None:
            self._stop("another run began")
            return
        layers = [i for i, layer in ex.cache.full.items() if not ex.is_dense(layer)]
        if not layers or ex.selector.name == "full":
            raise TraceError("nothing to record: no layer of this run selects blocks")
        if ex.raised.below:
            raise TraceError("a trace has one budget for all layers; record with audit.raise_below=0")
        if len({ex.cache.full[i].spec.num_kv_heads for i in layers}) > 1:
            raise TraceError("layers with different numbers of KV heads cannot be recorded in one trace")
        if ex.cache.max_blocks >= NO_BLOCK // 2:
            raise TraceError(f"rows of {ex.cache.max_blocks} blocks are too long to record")
        self._executor, self._layers = ex, {i: place for place, i in enumerate(layers)}
        rows, heads, budget = (
            ex.cache.rows,
            ex.cache.full[layers[0]].spec.num_kv_heads,
            ex.policy.block_budget,
        )
        per_step = 2 * len(layers) * rows * heads * (budget + 1)
        self.ring_steps = min(RING_STEPS, max(8, RING_BYTES // per_step))
        device = ex.cache.device
        shape = (len(layers), self.ring_steps, rows, heads)
        # int16 holds the bits of uint16: torch copies few things in uint16
        self._ids = torch.full((*shape, budget), -1, dtype=torch.int16, device=device)
        self._misses = torch.zeros(shape, dtype=torch.int16, device=device)
        self._lens = torch.zeros(self.ring_steps, rows, dtype=torch.int32, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        ex.observer = self

    def detach(self) -> None:
        """Take what is in the ring and look on no longer."""
        if self._executor is not None and self._executor.observer is self:
            self._executor.observer = None
            self._drain()

    def _stop(self, why: str) -> None:
        if self.stopped is None:
            self.stopped = why
            logger.warning("the trace ends after %d steps: %s", self._queued, why)
            self.detach()

    # ---- in and around a step --------------------------------------------------------------------------------------

    def before_step(self, rows: Sequence[int] | None) -> None:
        """Empty the ring when it is full; notice when the rows are not those of the step before."""
        assert self._executor is not None
        kv = self._executor.cache
        now = [(n, self._page(row, n - 1)) for row, n in enumerate(kv.lengths)]
        if self._expected is None:
            self._shape = (kv.max_blocks, kv.capacity)
            self._start = self._state()
        elif [n for n, _ in now] != [n for n, _ in self._expected]:
            return self._stop("rows began, ended or went on from another place")
        elif now != self._expected:
            return self._stop("rows became copies of other rows")
        elif self._shape != (kv.max_blocks, kv.capacity):
            return self._stop("the pools were allocated anew")
        takes = [rows is None or row in rows for row in range(kv.rows)]
        self._expected = [
            (n + take, self._page(row, n + take - 1))
            for row, (n, take) in enumerate(zip(kv.lengths, takes, strict=True))
        ]
        if self._queued - self._drained == self.ring_steps:
            self._drain()
        self._queued += 1
        return None

    def _page(self, row: int, position: int) -> int | None:
        """Return the host page of a token; None when there is none."""
        assert self._executor is not None
        kv = self._executor.cache
        block = position // kv.block_size
        return kv.pages[row][block] if 0 <= block < len(kv.pages[row]) else None

    def begin(self, rows: int) -> None:
        """Take the next place in the ring; rows beyond `rows` sit the step out."""
        assert self._executor is not None
        torch.remainder(self._count, self.ring_steps, out=self._place)
        self._count += 1
        self._lens.index_fill_(0, self._place, 0)
        self._lens[:, :rows].index_copy_(0, self._place, self._executor.cache.step_lens[None, :rows])

    def note(self, layer: FullLayer, workspace: DecodeWorkspace) -> None:
        """Append a layer's selected ids and its misses (those selected that have no slot yet)."""
        place = self._layers[layer.spec.layer_idx]
        ids = workspace.selected_blocks
        rows, _, budget = ids.shape
        hits = (workspace.hit_slots >= 0).sum(-1)
        misses = workspace.num_selected - hits
        self._ids[place, :, :rows, :, :budget].index_copy_(0, self._place, ids[None].short())
        self._misses[place, :, :rows].index_copy_(0, self._place, misses[None].short())

    # ---- what the host takes ---------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Copy the steps since the last time. Waits for the device."""
        count = int(self._count)
        fresh = count - self._drained
        if not fresh:
            return
        at = torch.arange(self._drained, count, device=self._place.device) % self.ring_steps
        lens = self._lens[at].cpu().numpy()
        inactive = (lens == 0).T[None, :, None, :]
        ids = self._ids[:, at].permute(0, 2, 3, 1, 4).cpu().contiguous().numpy().view(np.uint16)
        misses = self._misses[:, at].permute(0, 2, 3, 1).cpu().contiguous().numpy().view(np.uint16)
        ids = np.where(inactive[..., None], np.uint16(NO_BLOCK), ids)
        self._parts.append((ids, np.where(inactive, np.uint16(0), misses), lens))
        self._drained = self._queued = count

    def _state(self) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Return (start_used, start_order), uint16 [L, R, H, N]. Waits for the device, once."""
        assert self._executor is not None
        kv = self._executor.cache
        blocks = max(1, kv.blocks_of(max(kv.lengths)))
        used, order = [], []
        for i in self._layers:
            layer = kv.full[i]
            slot_of = layer.slot_of[..., :blocks].cpu().numpy()
            last = layer.last_used.cpu().numpy()[slot_of]
            heat = self._executor.heat_of(layer)[..., :blocks].cpu().numpy()
            own = np.array([kv.blocks_of(n) for n in kv.lengths])[:, None, None]
            rank = np.argsort(np.argsort(last, axis=-1, kind="stable"), axis=-1) + 1
            used.append(np.where(slot_of >= 0, rank, 0).astype(np.uint16))
            exists = np.arange(blocks) < own
            hottest = np.argsort(np.where(exists, -heat, np.inf), axis=-1, kind="stable")
            order.append(np.where(exists, hottest, NO_BLOCK).astype(np.uint16))
        return np.stack(used), np.stack(order)

    def trace(self) -> Trace:
        """Return what was recorded so far. Waits for the device.

        Raises:
            TraceError: nothing was.
        """
        if self._executor is not None and self._executor.observer is self:
            self._drain()
        if not self._parts or self._start is None:
            raise TraceError("nothing was recorded: no decode step ran inside record()")
        ids, misses = (np.concatenate([part[i] for part in self._parts], axis=3) for i in (0, 1))
        lens = np.concatenate([part[2] for part in self._parts])
        steps, rows = (np.flatnonzero(lens.any(axis)) for axis in (1, 0))  # the others decoded nothing
        if not len(steps):
            raise TraceError("nothing was recorded: no row took part in a decode step")
        used, order = self._start
        return Trace(
            ids=ids[:, rows][:, :, :, steps],
            lens=lens[np.ix_(steps, rows)],
            misses=misses[:, rows][:, :, :, steps],
            start_used=used[:, rows],
            start_order=order[:, rows],
            meta=self._meta(),
        )

    def _meta(self) -> dict[str, Any]:
        ex, model = self._executor, self._handle.model
        assert ex is not None and self._shape is not None
        first = next(iter(self._layers))
        policy, config = ex.policy, self._handle.config
        return {
            "layers": list(self._layers),
            "block_size": ex.cache.block_size,
            **{
                name: getattr(policy, name)
                for name in (
                    "block_budget", "sink_blocks", "recent_blocks", "query_blocks", "agnostic_blocks", "heat_decay",
                )
            },
            "capacity": self._shape[1],
            "block_bytes": ex.cache.page.blocks[first].block_bytes,
            "method": config.selection.method,
            "reuse_layers": {str(layer): source for layer, source in ex.reuse_layers.items()},
            "dtype": str(ex.cache.dtype).removeprefix("torch."),
            "device": device_name(ex.cache.device),
            "model": str(model.config.name_or_path or model.config.model_type),
            "config_hash": config_hash(model.config),
            "stopped": self.stopped,
            "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {
                "rheo_offload": rheo_offload.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }  # fmt: skip


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
