"""What prefetching would save: recorded block ids replayed against a pool of few slots, offline.

A policy says which absent blocks are fetched before a step asks for them; everything else is the runtime's own rule
(`rheo_offload/trace/simulate.py`). Two currencies: demand misses, which a step may have to wait for, and blocks over
the link, where a wrong guess counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from rheo_offload.trace.simulate import Geometry, Ids, Phase, Window, capacity_slots, simulate

__all__ = ["Geometry", "Phase", "Traffic", "Window", "belady", "capacity_slots", "replay", "warm_blocks"]


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


def warm_blocks(geometry: Geometry, start_order: Ids, capacity: int) -> NDArray[np.int64]:
    """Return what the pool holds after the prompt: sink, recent and hottest blocks, one slot left free."""
    num = -(-geometry.start_tokens // geometry.block_size)
    forced = {*range(geometry.sink_blocks), *range(num - geometry.recent_blocks, num)}
    hot = [int(b) for b in start_order if int(b) not in forced]
    return np.array(sorted(forced) + hot[: capacity - 1 - len(forced)])


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
    steps = len(selected)
    start_used = np.zeros(num_blocks, dtype=np.int64)
    start_used[warm] = 1
    found = simulate(
        selected,
        geometry.start_tokens + 1 + np.arange(steps),
        block_size=geometry.block_size,
        sink_blocks=geometry.sink_blocks,
        recent_blocks=geometry.recent_blocks,
        capacity=capacity,
        start_used=start_used,
        worth=worth,
        phases=list(phases),
    )
    missed = [ids[mask] for ids, mask in zip(selected, found.missed, strict=True)]
    return Traffic(demand=found.demand, early=found.early, missed=missed, useful=found.useful)


def belady(selected: Ids, num_blocks: int) -> NDArray[np.int64]:
    """Return the worth of a block after every step, [steps, num_blocks]: the sooner it is selected again the more."""
    steps = len(selected)
    next_use = np.full((steps, num_blocks), steps, dtype=np.int64)
    for t in range(steps - 1, 0, -1):
        next_use[t - 1] = next_use[t]
        next_use[t - 1, selected[t]] = t
    return -next_use
