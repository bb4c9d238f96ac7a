"""How recorded streams stand for a larger model or batch: hashes, so that every machine plays the same ones."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["start_steps", "stream_map"]

_MASK = (1 << 64) - 1


def start_steps(rows: int, choices: int) -> NDArray[np.int64]:
    """Return the recorded step below `choices` that every row begins with, [rows], so that rows are not in lockstep."""
    return (_hash(np.arange(rows), 1) % np.uint64(choices)).astype(np.int64)


def stream_map(streams: int, num_layers: int, num_kv_heads: int, rows: int) -> NDArray[np.int32]:
    """Return the stream that every (layer, row, KV head) plays, [num_layers, rows, num_kv_heads].

    A hash of the three numbers: neighbours play different streams, and more rows leave the first ones as they are.
    """
    layer, row, head = np.ogrid[:num_layers, :rows, :num_kv_heads]
    return (_hash(layer << 40 | row << 16 | head, 2) % np.uint64(streams)).astype(np.int32)


def _hash(values: NDArray[Any], salt: int) -> NDArray[np.uint64]:
    """Mix non-negative integers into 64 bits (the finaliser of splitmix64); the same on every machine."""
    z = values.astype(np.uint64) + np.uint64((salt * 0x9E3779B97F4A7C15) & _MASK)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
