"""From blocks per step to exposed milliseconds: a model of one link and one device; `Machine` holds the assumptions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.prefetch import Traffic
from bench.recorded import Recording

__all__ = ["Machine", "exposed_ms"]


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


def exposed_ms(
    traffic: Sequence[Traffic], recording: Recording, *, rows: int, machine: Machine, skip: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (exposed transfer, bytes over the link) of every step from `skip` on, ms and bytes.

    Demand misses of a layer travel while it attends to its hits; what does not fit is exposed. What is fetched ahead
    travels while the link is idle: `layer` windows in the layer before, `step` windows anywhere in the step before;
    what does not fit there delays the demand misses by as much and is exposed as well.

    Args:
        traffic: of every stream.
        recording: maps streams to layers, rows and heads. Rows wrap around instead of turning back, because a miss
            has a direction.
        rows: batch.
        machine: geometry and rates.
        skip: first steps to leave out.
    """
    stream = recording.stream_map(machine.num_layers, machine.num_kv_heads, rows)[None]  # [1, L, B, H]
    count = recording.recorded_steps - skip
    at = skip + (recording.times(rows, 1) + np.arange(count)[:, None]) % count  # [steps, B]

    def seconds(per_stream: list[NDArray[np.int64]]) -> NDArray[np.float64]:
        blocks = np.stack(per_stream)[stream, at[:, None, :, None]].sum((2, 3))  # [steps, L]
        return blocks * (machine.block_bytes / machine.link_bytes_per_s)

    demand = seconds([t.demand for t in traffic])
    by_layer = seconds([t.early["layer"] for t in traffic])
    by_step = seconds([t.early["step"] for t in traffic])
    moved = (demand + by_layer + by_step).sum(1) * machine.link_bytes_per_s
    attended = rows * machine.num_kv_heads * recording.block_budget * machine.block_bytes
    hits = (attended - demand * machine.link_bytes_per_s) / machine.attention_bytes_per_s
    exposed = np.maximum(0.0, demand - hits)
    idle = machine.rest_of_layer_s + np.maximum(0.0, hits - demand)  # [steps, L]
    before = np.roll(idle.ravel(), 1).reshape(
        idle.shape
    )  # of the layer before, or the last one of the step before
    late = np.maximum(0.0, by_layer - before)
    room = np.maximum(0.0, before - by_layer).sum(1)
    total = exposed.sum(1) + late.sum(1) + np.maximum(0.0, by_step.sum(1) - room)
    return total * 1e3, moved
