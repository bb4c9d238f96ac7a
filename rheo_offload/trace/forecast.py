"""From blocks per step to milliseconds: a model of one link and one device. `Machine` holds the assumptions.

Demand misses of a layer travel while it attends to its hits; what does not fit is exposed. What is fetched ahead
travels while the link is idle: `layer` windows in the layer before, `step` windows anywhere in the step before; what
does not fit there delays the demand misses by as much and is exposed as well.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Machine", "exposed_ms", "step_ms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Llama-3.1-8B on one H100 with PCIe 5.0 x16: rates and times as measured there, rounded."""

    num_layers: int = 32
    num_kv_heads: int = 8
    block_bytes: int = 32 * 1024
    link_bytes_per_s: float = 50e9
    attention_bytes_per_s: float = 3.0e12
    rest_of_layer_s: float = 215e-6
    """A layer without attention: when the link has nothing to do on demand."""

    def attended_s(self, rows: int, block_budget: int) -> float:
        """Return the seconds in which a layer reads every selected block from device memory."""
        return rows * self.num_kv_heads * block_budget * self.block_bytes / self.attention_bytes_per_s


def exposed_ms(
    demand: NDArray[np.integer],
    by_layer: NDArray[np.integer],
    by_step: NDArray[np.integer],
    *,
    rows: int,
    block_budget: int,
    machine: Machine,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (exposed transfer, bytes over the link) of every step, ms and bytes, [steps] each.

    Args:
        demand: [steps, layers] blocks that all rows and heads of a layer miss.
        by_layer: the same, fetched a layer ahead.
        by_step: the same, fetched a step ahead.
        rows: batch.
        block_budget: blocks selected per row and KV head.
        machine: geometry and rates.
    """
    per_block = machine.block_bytes / machine.link_bytes_per_s
    needed, layer_ahead, step_ahead = demand * per_block, by_layer * per_block, by_step * per_block
    moved = (demand + by_layer + by_step).sum(1) * float(machine.block_bytes)
    hits = machine.attended_s(rows, block_budget) - demand * (
        machine.block_bytes / machine.attention_bytes_per_s
    )
    exposed = np.maximum(0.0, needed - hits)
    idle = machine.rest_of_layer_s + np.maximum(0.0, hits - needed)
    before = np.roll(idle.ravel(), 1).reshape(
        idle.shape
    )  # of the layer before, or the last of the step before
    late = np.maximum(0.0, layer_ahead - before)
    room = np.maximum(0.0, before - layer_ahead).sum(1)
    total = exposed.sum(1) + late.sum(1) + np.maximum(0.0, step_ahead.sum(1) - room)
    return total * 1e3, moved


def step_ms(exposed: float, *, rows: int, block_budget: int, machine: Machine) -> float:
    """Return a step's milliseconds: layers without attention, attention over the selected blocks, what is exposed."""
    layer = machine.rest_of_layer_s + machine.attended_s(rows, block_budget)
    return machine.num_layers * layer * 1e3 + exposed
