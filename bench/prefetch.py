"""What prefetching would save: recorded block ids replayed against a pool of few slots, offline.

A policy says which absent blocks are fetched before a step asks for them; everything else is the runtime's own rule
(`csrc_free_kernels/README.md`, append and resolve). Two currencies: demand misses, which a step may have to wait for,
and blocks over the link, where a wrong guess counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Geometry", "Phase", "Traffic", "belady", "capacity_slots", "replay", "warm_blocks"]

Ids = NDArray[np.integer]
Window = Literal["step", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What the victim rule must know."""

    block_size: int
    sink_blocks: int
    recent_blocks: int
    start_tokens: int
    """Tokens before the first step."""

    def tail(self, step: int) -> int:
        """Return the open block of a step (0 = the first recorded one)."""
        return (self.start_tokens + step) // self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Blocks that are fetched ahead of their step, those first that come first.

    Attributes:
        wanted: for every step an array of block ids, best first; resident ones are skipped.
        limit: most blocks fetched per step; None: all.
        window: how early they are known. `step`: when the step before is done; blocks that it selected are then no
            victims, so a full pool fetches nothing. `layer`: one layer ahead in the same step; only blocks that are
            wanted themselves are spared.
    """

    wanted: Sequence[Ids]
    limit: int | None = None
    window: Window = "step"


@dataclass(slots=True)
class Traffic:
    """Blocks per step of one stream, int64 [steps] each."""

    demand: NDArray[np.int64]
    """Selected and absent when the step asked for them."""
    early: dict[Window, NDArray[np.int64]]
    """Fetched ahead."""
    missed: list[Ids] = field(default_factory=list)
    """The blocks that `demand` counts."""
    useful: int = 0
    """Blocks fetched ahead that were selected before they were evicted."""

    @property
    def total(self) -> int:
        """Blocks over the link, all steps."""
        return int(self.demand.sum() + sum(part.sum() for part in self.early.values()))

    def known_early(self, window: Window) -> Self:
        """Return the same traffic with every demand miss fetched ahead."""
        early = self.early | {window: self.early[window] + self.demand}
        useful = self.useful + int(self.demand.sum())
        return replace(self, demand=np.zeros_like(self.demand), early=early, missed=[], useful=useful)


def capacity_slots(block_budget: int, ratio: float) -> int:
    """Return the slots of a (row, KV head), as the runtime sizes its pool: ratio x budget, at least budget + 1."""
    return max(block_budget + 1, int(-(-block_budget * ratio // 1)))


def warm_blocks(geometry: Geometry, start_order: Ids, capacity: int) -> NDArray[np.int64]:
    """Return what the pool holds after the prompt: sink, recent and hottest blocks, one slot left free."""
    num = -(-geometry.start_tokens // geometry.block_size)
    forced = {*range(geometry.sink_blocks), *range(num - geometry.recent_blocks, num)}
    hot = [int(b) for b in start_order if int(b) not in forced]
    return np.array(sorted(forced) + hot[: capacity - 1 - len(forced)])


class _Pool:
    """The slots of one stream: which blocks are resident, and when each was selected last."""

    def __init__(self, num_blocks: int, capacity: int, geometry: Geometry, warm: Ids) -> None:
        self.capacity, self.geometry = capacity, geometry
        self.resident = np.zeros(num_blocks, dtype=bool)
        self.resident[warm] = True
        self.last_used = np.full(num_blocks, -1, dtype=np.int64)
        self.fetched_early = np.zeros(num_blocks, dtype=bool)

    def take(
        self,
        blocks: Ids,
        spared: NDArray[np.bool_],
        tail: int,
        stamp: int,
        worth: NDArray[Any] | None = None,
    ) -> int:
        """Make absent blocks resident, in order, while there are victims; return how many got a slot.

        Free slots first, then the smallest (last use, id), never a sink, tail or spared block; with `worth` [N] the
        smallest (worth, id).
        """
        free = self.capacity - int(self.resident.sum())
        missing = len(blocks) - free
        if missing > 0:
            candidate = self.resident & ~spared
            candidate[: self.geometry.sink_blocks] = False
            candidate[tail] = False
            victims = np.flatnonzero(candidate)
            key = (self.last_used if worth is None else worth)[victims]
            victims = victims[np.argsort(key, kind="stable")][:missing]
            self.resident[victims] = False
            self.fetched_early[victims] = False
            blocks = blocks[: free + len(victims)]
        self.resident[blocks] = True
        self.last_used[blocks] = stamp
        return len(blocks)


def replay(
    selected: Ids,
    geometry: Geometry,
    *,
    capacity: int,
    num_blocks: int,
    warm: Ids,
    phases: Iterable[Phase] = (),
    worth: NDArray[Any] | None = None,
) -> Traffic:
    """Replay one stream against a pool of `capacity` slots.

    Args:
        selected: [steps, S] block ids.
        geometry: of the recording.
        capacity: slots; at least S + 1.
        num_blocks: ids are below it.
        warm: blocks resident before the first step.
        phases: prefetching; none is the runtime's plain LRU.
        worth: [steps, num_blocks], what the pool keeps instead of the last used: victims are the smallest (worth, id)
            of the step just selected. `belady(selected)` needs the future and is the bound: no policy, early or not,
            moves fewer blocks through the same slots.

    Returns:
        Blocks per step.
    """
    phases, steps = list(phases), len(selected)
    pool = _Pool(num_blocks, capacity, geometry, warm)
    traffic = Traffic(
        demand=np.zeros(steps, dtype=np.int64),
        early={w: np.zeros(steps, dtype=np.int64) for w in ("step", "layer")},
    )
    nothing = np.zeros(num_blocks, dtype=bool)
    for t, ids in enumerate(selected):
        tail = geometry.tail(t)
        before, now = (None, None) if worth is None else (worth[max(0, t - 1)], worth[t])
        for phase in phases:
            _prefetch(pool, phase, t, traffic, before)
        chosen = nothing.copy()
        chosen[ids] = True
        if not pool.resident[tail]:
            pool.take(np.array([tail]), nothing, tail, t, before)
        hits = chosen & pool.resident
        pool.last_used[hits] = t
        traffic.useful += int((hits & pool.fetched_early).sum())
        pool.fetched_early[hits] = False
        missing = ids[~pool.resident[ids]]
        traffic.demand[t] = len(missing)
        traffic.missed.append(missing)
        if pool.take(missing, chosen, tail, t, now) < len(missing):
            raise ValueError(f"a pool of {capacity} slots cannot hold the {len(ids)} blocks of step {t}")
    return traffic


def _prefetch(pool: _Pool, phase: Phase, t: int, traffic: Traffic, worth: NDArray[Any] | None) -> None:
    """Fetch the absent blocks of a phase ahead of step t."""
    wanted = phase.wanted[t]
    absent = wanted[~pool.resident[wanted]][: phase.limit]
    if not len(absent):
        return
    spared = np.zeros_like(pool.resident)
    spared[wanted if phase.limit is None else absent] = True
    if phase.window == "step":
        spared |= pool.last_used == t - 1
    count = pool.take(absent, spared, pool.geometry.tail(t - 1), t - 1, worth)
    pool.fetched_early[absent[:count]] = True
    traffic.early[phase.window][t] += count


def belady(selected: Ids, num_blocks: int) -> NDArray[np.int64]:
    """Return the worth of a block after every step, [steps, num_blocks]: the sooner it is selected again the more."""
    steps = len(selected)
    next_use = np.full((steps, num_blocks), steps, dtype=np.int64)
    for t in range(steps - 1, 0, -1):
        next_use[t - 1] = next_use[t]
        next_use[t - 1, selected[t]] = t
    return -next_use
