"""One (row, layer, KV head) against a pool of few slots: which blocks are missed, step by step.

The rules are the runtime's own (append and resolve in `csrc_free_kernels/README.md`): free slots first, then the
victim that the policy names, never a sink block, the tail, or a block selected in this step. The policy is the only
thing that changes. Compiled, because a trace has hundreds of streams of a thousand steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["POLICIES", "Geometry", "Outcome", "Phase", "PolicyName", "Window", "capacity_slots", "simulate"]

Ids = NDArray[np.integer]
Window = Literal["step", "layer"]
PolicyName = Literal["fifo", "lru", "lfu", "heat", "belady"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
_FIFO, _LRU, _LFU, _HEAT, _BELADY, _GIVEN = range(6)


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
        wanted: for every step an array of block ids, best first (or one array [steps, W] for all); resident ones
            are skipped, as are negative ones.
        limit: most blocks fetched per step; None: all.
        window: how early they are known. `step`: when the step before is done; blocks that it selected are then no
            victims, so a full pool fetches nothing. `layer`: one layer ahead in the same step; only blocks that are
            wanted themselves are spared.
    """

    wanted: Sequence[Ids] | Ids
    limit: int | None = None
    window: Window = "step"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Blocks per step of one stream. The tail is no miss: it is made where it is needed."""

    demand: NDArray[np.int64]
    """[steps] selected and absent."""
    forced: NDArray[np.int64]
    """[steps] those of `demand` that are sink or recent blocks."""
    early: dict[Window, NDArray[np.int64]]
    """[steps] fetched ahead."""
    missed: NDArray[np.bool_]
    """[steps, S] which selected blocks `demand` counts."""
    useful: int
    """Blocks fetched ahead that were selected before they were evicted."""


def capacity_slots(block_budget: int, ratio: float) -> int:
    """Return the slots of a (row, KV head), as the runtime sizes its pool: ratio x budget, at least budget + 1."""
    return max(block_budget + 1, int(-(-block_budget * ratio // 1)))


def simulate(
    selected: Ids,
    lens: Ids,
    *,
    block_size: int,
    sink_blocks: int,
    recent_blocks: int,
    capacity: int,
    start_used: Ids,
    policy: PolicyName = "lru",
    heat_decay: float = 0.98,
    worth: NDArray[Any] | None = None,
    phases: Sequence[Phase] = (),
) -> Outcome:
    """Play one stream against a pool of `capacity` slots.

    Args:
        selected: [steps, S] block ids, negative where there is none (at the end).
        lens: [steps] tokens of the row, the step's own included; 0 = the row sat the step out.
        block_size: tokens in a block.
        sink_blocks: leading blocks, never victims.
        recent_blocks: last blocks of every step, counted as forced like the sink.
        capacity: slots.
        start_used: [N] what is resident before the first step: 0 = absent, otherwise how recently it was used,
            from 1 (the older the smaller; equal ones go by block id). Every id is below N.
        policy: who leaves. `fifo`: who came first. `lru`: who was selected longest ago. `lfu`: who was selected
            least often since the first step, absences included. `heat`: the same, each selection decaying by
            `heat_decay` a step. `belady`: who is selected again last (it knows the future and is the bound). Ties of
            `lfu` and `heat` go by last use, others to the lower id.
        heat_decay: of `heat`.
        worth: [steps, N] in place of `policy`: the smallest (worth, id) of the step just selected leaves.
        phases: what is fetched ahead.

    Returns:
        Blocks per step.

    Raises:
        ValueError: the pool cannot hold the blocks of a step, or the policy is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    steps = len(selected)
    ids = np.ascontiguousarray(selected, dtype=np.int64)
    widest = max((max(map(len, p.wanted), default=0) for p in phases), default=0)
    ahead = np.full((len(phases), steps, widest), -1, dtype=np.int64)
    for i, phase in enumerate(phases):
        if isinstance(phase.wanted, np.ndarray):
            ahead[i] = phase.wanted
            continue
        for t, wanted in enumerate(phase.wanted):
            ahead[i, t, : len(wanted)] = wanted
    limits = np.array([-1 if p.limit is None else p.limit for p in phases], dtype=np.int64)
    windows = np.array([get_args(Window).index(p.window) for p in phases], dtype=np.int64)
    table = np.empty((0, 0)) if worth is None else np.ascontiguousarray(worth, dtype=np.float64)
    counts = np.zeros((4, steps), dtype=np.int64)
    missed = np.zeros(ids.shape, dtype=np.bool_)
    code = POLICIES.index(policy) if worth is None else _GIVEN
    result = _play(
        ids, np.ascontiguousarray(lens, dtype=np.int64), block_size, sink_blocks, recent_blocks, capacity,
        np.ascontiguousarray(start_used, dtype=np.int64), code, heat_decay, table,
        ahead, limits, windows, counts, missed,
    )  # fmt: skip
    if result < 0:
        step = -1 - result
        raise ValueError(
            f"a pool of {capacity} slots cannot hold the {(ids[step] >= 0).sum()} blocks of step {step}"
        )
    return Outcome(counts[0], counts[1], {"step": counts[2], "layer": counts[3]}, missed, int(result))


# ---- compiled ----------------------------------------------------------------------------------------------------


class _Pool(NamedTuple):
    """State of the slots; arrays of N are by block."""

    held: Any  # [capacity] block of a slot
    size: Any  # [1] slots in use
    slot: Any  # [N] -1 = absent
    used: Any  # [N] step of the last use
    loaded: Any  # [N] step when it came
    count: Any  # [N] selections
    heat: Any  # [N] as of step `used`
    coming: Any  # [N] next step that selects it
    spared: Any  # [N] the latest round that spares it
    early: Any  # [N] fetched ahead and not selected yet


@njit(cache=True)  # type: ignore[untyped-decorator]
def _worth(pool, code, decay, table, at, t, block):  # type: ignore[no-untyped-def]
    """What a block is worth to a policy, and what breaks ties. `at`: the row of the given table."""
    used = float(pool.used[block])
    if code == _LRU:
        return used, 0.0
    if code == _FIFO:
        return float(pool.loaded[block]), 0.0
    if code == _LFU:
        return float(pool.count[block]), used
    if code == _HEAT:
        return pool.heat[block] * decay ** (t - used), used
    if code == _BELADY:
        return -float(pool.coming[block]), 0.0
    return table[at, block], 0.0


@njit(cache=True)  # type: ignore[untyped-decorator]
def _claim(pool, block, mark, not_used_at, tail, sink, capacity, code, decay, table, at, t):  # type: ignore[no-untyped-def]
    """Give a block a slot: a free one, or the worst victim's. False when there is none."""
    place = -1
    if pool.size[0] < capacity:
        place = pool.size[0]
        pool.size[0] += 1
    else:
        least, second, worst = 0.0, 0.0, -1
        for i in range(capacity):
            other = pool.held[i]
            if other < sink or other == tail or pool.spared[other] == mark or pool.used[other] == not_used_at:
                continue
            first, tie = _worth(pool, code, decay, table, at, t, other)
            if (
                worst < 0
                or first < least
                or (first == least and (tie < second or (tie == second and other < worst)))
            ):
                least, second, worst, place = first, tie, other, i
        if place < 0:
            return False
        pool.slot[worst] = -1
        pool.early[worst] = 0
    pool.held[place] = block
    pool.slot[block] = place
    return True


@njit(cache=True)  # type: ignore[untyped-decorator]
def _start(start_used, capacity, ids):  # type: ignore[no-untyped-def]
    """The pool before the first step, and for every selected block of a step the next step that selects it."""
    blocks, (steps, width) = len(start_used), ids.shape
    newest = start_used.max() if blocks else 0
    pool = _Pool(
        np.empty(capacity, np.int64), np.zeros(1, np.int64), np.full(blocks, -1, np.int64),
        np.full(blocks, -1, np.int64), np.full(blocks, -1, np.int64), np.zeros(blocks, np.int64),
        np.zeros(blocks, np.float64), np.full(blocks, steps, np.int64), np.zeros(blocks, np.int64),
        np.zeros(blocks, np.int64),
    )  # fmt: skip
    for block in range(blocks):
        if start_used[block] > 0 and pool.size[0] < capacity:
            pool.held[pool.size[0]] = block
            pool.slot[block] = pool.size[0]
            pool.size[0] += 1
            pool.used[block] = pool.loaded[block] = start_used[block] - newest - 1
    following = np.empty((steps, width), np.int64)
    for t in range(steps - 1, -1, -1):
        for s in range(width):
            if ids[t, s] >= 0:
                following[t, s] = pool.coming[ids[t, s]]
        for s in range(width):
            if ids[t, s] >= 0:
                pool.coming[ids[t, s]] = t
    return pool, following


@njit(cache=True)  # type: ignore[untyped-decorator]
def _fetch_ahead(pool, wanted, limit, window, mark, tail, sink, capacity, code, decay, table, t):  # type: ignore[no-untyped-def]
    """Fetch the absent blocks of `wanted` ahead of step t; returns how many."""
    absent = np.empty(len(wanted), np.int64)
    n = 0
    for block in wanted:
        if block >= 0 and pool.slot[block] < 0 and (limit < 0 or n < limit):
            absent[n] = block
            n += 1
            pool.spared[block] = mark
        elif block >= 0 and limit < 0:
            pool.spared[block] = mark
    never = -(1 << 62)
    for i in range(n):
        block = absent[i]
        spare = t - 1 if window == 0 else never
        if not _claim(pool, block, mark, spare, tail, sink, capacity, code, decay, table, max(0, t - 1), t):
            return i
        pool.used[block] = pool.loaded[block] = t - 1
        pool.early[block] = 1
    return n


@njit(cache=True)  # type: ignore[untyped-decorator]
def _play(  # type: ignore[no-untyped-def]
    ids,
    lens,
    block_size,
    sink,
    recent,
    capacity,
    start_used,
    code,
    decay,
    table,
    ahead,
    limits,
    windows,
    counts,
    missed,
):
    """All steps of a stream. Fills counts [4, steps] (demand, forced, early by step, by layer) and missed [steps, S].

    Returns the useful early blocks, or -1 - t when the pool cannot hold the blocks of step t.
    """
    pool, following = _start(start_used, capacity, ids)
    never, mark, useful = -(1 << 62), 0, 0
    for t in range(len(ids)):
        if lens[t] == 0:
            continue
        tail = (lens[t] - 1) // block_size
        for p in range(len(limits)):
            mark += 1
            old_tail = (lens[t] - 2) // block_size
            counts[2 + windows[p], t] += _fetch_ahead(
                pool,
                ahead[p, t],
                limits[p],
                windows[p],
                mark,
                old_tail,
                sink,
                capacity,
                code,
                decay,
                table,
                t,
            )
        mark += 1
        if pool.slot[tail] < 0:
            _claim(pool, tail, mark, never, tail, sink, capacity, code, decay, table, max(0, t - 1), t)
            pool.loaded[tail] = t
            pool.used[tail] = t
        for s in range(ids.shape[1]):
            block = ids[t, s]
            if block < 0:
                break
            pool.spared[block] = mark
            missed[t, s] = pool.slot[block] < 0
            useful += pool.early[block]
            pool.early[block] = 0
            pool.heat[block] = pool.heat[block] * decay ** float(t - pool.used[block]) + 1.0
            pool.used[block] = t
            pool.count[block] += 1
            pool.coming[block] = following[t, s]
        for s in range(ids.shape[1]):
            if missed[t, s]:
                block = ids[t, s]
                counts[0, t] += 1
                counts[1, t] += block < sink or block > tail - recent
                if not _claim(pool, block, mark, never, tail, sink, capacity, code, decay, table, t, t):
                    return -1 - t
                pool.loaded[block] = t
    return useful
