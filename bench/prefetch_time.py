"""From the traffic of recorded streams to exposed milliseconds (the model is `rheo_offload/trace/forecast.py`)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.prefetch import Traffic
from bench.recorded import Recording
from rheo_offload.trace import forecast
from rheo_offload.trace.forecast import Machine

__all__ = ["Machine", "exposed_ms"]


def exposed_ms(
    traffic: Sequence[Traffic], recording: Recording, *, rows: int, machine: Machine, skip: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (exposed transfer, bytes over the link) of every step from `skip` on, ms and bytes.

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

    def blocks(per_stream: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.stack(per_stream)[stream, at[:, None, :, None]].sum((2, 3))  # [steps, L]

    return forecast.exposed_ms(
        blocks([t.demand for t in traffic]),
        blocks([t.early["layer"] for t in traffic]),
        blocks([t.early["step"] for t in traffic]),
        rows=rows,
        block_budget=recording.block_budget,
        machine=machine,
    )
