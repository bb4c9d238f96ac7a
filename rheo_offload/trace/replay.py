"""A trace replayed under every policy and capacity: who would have missed how much.

Every (layer, row, KV head) is a stream with a pool of its own, as in the runtime. `lru` at the capacity of the run is
what the run did, miss by miss; everything else is what it would have done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rheo_offload.errors import TraceError
from rheo_offload.trace.file import NO_BLOCK, Trace
from rheo_offload.trace.forecast import Machine, exposed_ms, step_ms
from rheo_offload.trace.mapping import start_steps, stream_map
from rheo_offload.trace.simulate import POLICIES, Phase, PolicyName, Window, capacity_slots, simulate

__all__ = ["PREFETCH", "Forecast", "Replay", "Selected", "forecast", "replay", "replay_all"]

PrefetchName = Literal["previous-layer", "perfect"]
PREFETCH: tuple[PrefetchName, ...] = get_args(PrefetchName)
"""`previous-layer`: the ids that the recorded layer before selected in this step. `perfect`: the step's own, a layer
early (a bound). Both evict as `lru`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """How many blocks a trace selects, the tail left out, [L, R, H, T] each."""

    all: NDArray[np.int64]
    forced: NDArray[np.int64]
    """Sink and recent blocks."""
    active: NDArray[np.bool_]
    """[R, 1, T] whether the row decoded."""

    @classmethod
    def of(cls, trace: Trace) -> "Selected":
        """Count the blocks of a trace."""
        meta = trace.meta
        tail = ((trace.lens - 1) // meta["block_size"]).T[None, :, None, :, None]  # [1, R, 1, T, 1]
        ids = trace.ids.astype(np.int32)
        closed = (ids != NO_BLOCK) & (ids != tail)
        forced = closed & ((ids < meta["sink_blocks"]) | (ids > tail - meta["recent_blocks"]))
        return cls(all=closed.sum(-1), forced=forced.sum(-1), active=(trace.lens > 0).T[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One policy at one capacity. Arrays are [L, R, H, T], blocks."""

    policy: str
    ratio: float
    """Capacity over budget."""
    capacity: int
    """Slots per (row, KV head)."""
    demand: NDArray[np.int64]
    """Selected and absent."""
    forced: NDArray[np.int64]
    """Those of `demand` that are sink or recent."""
    early: dict[Window, NDArray[np.int64]]
    """Fetched ahead."""
    useful: int
    """Blocks fetched ahead that were selected in time."""

    def hit_rate(self, selected: Selected, skip: int = 0) -> float:
        """Return hits over selected blocks, tail left out, from step `skip` on; NaN when nothing was selected."""
        return _share(self.demand[..., skip:].sum(), selected.all[..., skip:].sum())

    def hit_rate_unforced(self, selected: Selected, skip: int = 0) -> float:
        """Return the same without sink and recent blocks, which nearly always hit."""
        demand = (self.demand - self.forced)[..., skip:].sum()
        return _share(demand, (selected.all - selected.forced)[..., skip:].sum())

    def demand_blocks(self, selected: Selected, skip: int = 0) -> float:
        """Return the blocks fetched on demand per (layer, row, KV head) and step in which the row decoded."""
        return self._per_step(self.demand, selected, skip)

    def link_blocks(self, selected: Selected, skip: int = 0) -> float:
        """Return the same with what was fetched ahead, wrong guesses included."""
        return self._per_step(self.demand + sum(self.early.values()), selected, skip)

    @staticmethod
    def _per_step(blocks: NDArray[np.int64], selected: Selected, skip: int) -> float:
        active = np.broadcast_to(selected.active, blocks.shape)[..., skip:].sum()
        return float(blocks[..., skip:].sum()) / float(active) if active else float("nan")


def _share(misses: int, selected: int) -> float:
    return 1 - float(misses) / float(selected) if selected else float("nan")


def replay(trace: Trace, policy: PolicyName | PrefetchName, *, ratio: float | None = None) -> Replay:
    """Replay every stream of a trace.

    The pool begins with what was resident in the run; a smaller one with forced and hottest blocks of it, a larger
    one with the hottest absent blocks besides.

    Args:
        trace: the run.
        policy: of `POLICIES` or `PREFETCH`.
        ratio: capacity over budget; None: the capacity of the run.

    Raises:
        TraceError: an unknown policy, or a capacity below one budget.
    """
    if policy not in POLICIES and policy not in PREFETCH:
        raise TraceError(f"unknown policy {policy!r}; known: {', '.join((*POLICIES, *PREFETCH))}")
    meta, budget = trace.meta, trace.meta["block_budget"]
    if ratio is not None and not (math.isfinite(ratio) and ratio >= 1):
        raise TraceError(
            f"a capacity of {ratio} x the budget cannot hold what a step selects; the least is 1.0"
        )
    capacity = int(meta["capacity"]) if ratio is None else capacity_slots(budget, ratio)
    shape = trace.ids.shape[:4]
    blocks = max(trace.start_used.shape[-1], int(-(-trace.lens.max() // meta["block_size"])))
    found = {name: np.zeros(shape, dtype=np.int64) for name in ("demand", "forced", "step", "layer")}
    useful = 0
    for place in np.ndindex(shape[:3]):
        layer, row, _ = place
        try:
            outcome = simulate(
                _ids(trace, place),
                trace.lens[:, row],
                block_size=meta["block_size"],
                sink_blocks=meta["sink_blocks"],
                recent_blocks=meta["recent_blocks"],
                capacity=capacity,
                start_used=start_of(trace, place, capacity, blocks),
                policy=_evicts(policy),
                heat_decay=meta["heat_decay"],
                phases=_phases(policy, trace, place),
            )
        except ValueError as error:
            raise TraceError(str(error)) from error
        found["demand"][place], found["forced"][place] = outcome.demand, outcome.forced
        found["step"][place], found["layer"][place] = outcome.early["step"], outcome.early["layer"]
        useful += outcome.useful
    return Replay(
        policy=policy,
        ratio=capacity / budget if ratio is None else ratio,
        capacity=capacity,
        demand=found["demand"],
        forced=found["forced"],
        early={"step": found["step"], "layer": found["layer"]},
        useful=useful,
    )


def _evicts(policy: PolicyName | PrefetchName) -> PolicyName:
    return "lru" if policy == "previous-layer" or policy == "perfect" else policy


def _ids(trace: Trace, place: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the ids of a stream, -1 where there is none."""
    ids = trace.ids[place].astype(np.int64)
    ids[ids == NO_BLOCK] = -1
    return ids


def _phases(policy: str, trace: Trace, place: tuple[int, ...]) -> list[Phase]:
    layer, row, head = place
    if policy == "perfect":
        return [Phase(wanted=_ids(trace, place), window="layer")]
    if policy == "previous-layer" and layer:
        return [Phase(wanted=_ids(trace, (layer - 1, row, head)), window="layer")]
    return []


def start_of(trace: Trace, place: tuple[int, ...], capacity: int, blocks: int) -> NDArray[np.int64]:
    """Return what a pool of `capacity` slots holds before the first step, [blocks], as `simulate` wants it."""
    meta = trace.meta
    used = np.zeros(blocks, dtype=np.int64)
    recorded = trace.start_used[place]
    used[: len(recorded)] = recorded
    change = capacity - int(meta["capacity"])
    order = trace.start_order[place]
    order = order[order != NO_BLOCK]
    if change > 0:
        absent = order[used[order] == 0][:change]
        used[used > 0] += 1  # they are older than all that was resident
        used[absent] = 1
    elif int((used > 0).sum()) > capacity:
        count = len(order)
        forced = (order < meta["sink_blocks"]) | (order >= count - meta["recent_blocks"])
        worth = np.concatenate([order[forced], order[~forced]])
        kept = worth[used[worth] > 0][:capacity]
        dropped = np.ones(blocks, dtype=np.bool_)
        dropped[kept] = False
        used[dropped] = 0
    return used


def replay_all(
    trace: Trace,
    ratios: Sequence[float],
    policies: Sequence[PolicyName | PrefetchName] = (*POLICIES, *PREFETCH),
) -> list[Replay]:
    """Replay policies x capacities, policy by policy."""
    return [replay(trace, policy, ratio=ratio) for policy in policies for ratio in ratios]


# ---- forecast ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A step of a target model and batch, means over the recorded steps."""

    rows: int
    exposed_ms: float
    step_ms: float
    link_bytes: float
    """Per step."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all rows per second."""
        return self.rows / self.step_ms * 1e3


def forecast(trace: Trace, found: Replay, *, rows: int, machine: Machine, skip: int = 0) -> Forecast:
    """Estimate a step of `machine` with `rows` rows whose streams miss like those of a replay.

    A target of the trace's own layers and heads plays them in place (rows repeat); any other draws streams by a
    hash. Rows begin at different recorded steps and wrap around.

    Args:
        trace: the run.
        found: its replay.
        rows: batch of the target.
        machine: the target's geometry, link and device.
        skip: first steps left out.

    Raises:
        TraceError: nothing is left after the skipped steps.
    """
    layers, recorded_rows, heads, steps = found.demand.shape
    count = steps - skip
    if count < 1:
        raise TraceError(f"skipping {skip} steps leaves nothing of {steps}")
    if (machine.num_layers, machine.num_kv_heads) == (layers, heads):
        streams = np.arange(layers * recorded_rows * heads).reshape(layers, recorded_rows, heads)
        stream = streams[:, np.arange(rows) % recorded_rows]
    else:
        stream = stream_map(trace.streams, machine.num_layers, machine.num_kv_heads, rows)
    first = np.zeros(1, np.int64) if rows == 1 else start_steps(rows, count)
    at = skip + (first + np.arange(count)[:, None]) % count  # [steps, rows]

    def blocks(counted: NDArray[np.int64]) -> NDArray[np.int64]:
        by_stream, total = counted.reshape(-1, steps), np.zeros((count, machine.num_layers), dtype=np.int64)
        for row in range(rows):  # one row at a time: layers x rows x heads x steps is large
            total += by_stream[stream[:, row, :, None], at[None, None, :, row]].sum(1).T
        return total

    budget = int(trace.meta["block_budget"])
    ms, moved = exposed_ms(
        blocks(found.demand), blocks(found.early["layer"]), blocks(found.early["step"]),
        rows=rows, block_budget=budget, machine=machine,
    )  # fmt: skip
    exposed = float(ms.mean())
    whole = step_ms(exposed, rows=rows, block_budget=budget, machine=machine)
    return Forecast(rows=rows, exposed_ms=exposed, step_ms=whole, link_bytes=float(moved.mean()))
