"""A tiny run with a small pool, recorded once; and traces made by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from rheo_offload import RheoConfig, offload
from rheo_offload.trace.file import NO_BLOCK, Trace
from rheo_offload.trace.recorder import record
from tests.helpers.tiny_model import tiny_model

SETTINGS = [
    "cache.block_size=16",
    "selection.token_budget=128",
    "cache.capacity_ratio=1.25",
    "cache.device_memory=floor",
    "cache.host_memory=64MiB",
]


def small_pool(family: str = "llama", *settings: str, device: str = "cpu", **overrides: Any) -> Any:
    """An offloaded tiny model: 8 blocks of 16 tokens selected, 10 slots; overrides are of the model's config."""
    model = tiny_model(family, **{"max_position_embeddings": 4096, **overrides})
    return offload(model.to(device), RheoConfig().with_overrides([*SETTINGS, *settings]), check=False)


def prompt(rows: int, tokens: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random ids; the last row begins with `padding` padding tokens."""
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def run() -> tuple[Trace, Any]:
    """(trace, the run's own figures): two rows of different length, 70 steps."""
    model = small_pool()
    with record(model) as recorder:
        model.generate(**prompt(2, 330, 37), max_new_tokens=70, do_sample=False)
    return recorder.trace(), model.rheo.stats()


def made(
    steps: list[str], *, capacity: int = 5, used: str = "09", order: str = "9012345678", **meta: Any
) -> Trace:
    """One stream of one layer: sink 0, a tail 9 that never moves, and the blocks named by the digits."""
    names = [sorted({0, 9, *map(int, step)}) for step in steps]
    width = max(map(len, names))
    ids = np.full((1, 1, 1, len(steps), width), NO_BLOCK, dtype=np.uint16)
    for t, blocks in enumerate(names):
        ids[0, 0, 0, t, : len(blocks)] = blocks
    start = np.zeros((1, 1, 1, 10), dtype=np.uint16)
    for rank, block in enumerate(used, start=1):
        start[..., int(block)] = rank
    return Trace(
        ids=ids,
        lens=9501 + np.arange(len(steps), dtype=np.int32)[:, None],
        misses=np.zeros((1, 1, 1, len(steps)), dtype=np.uint16),
        start_used=start,
        start_order=np.array([int(c) for c in order], dtype=np.uint16)[None, None, None],
        meta={
            "layers": [0], "block_size": 1000, "block_budget": width, "sink_blocks": 1, "recent_blocks": 1,
            "query_blocks": width - 2, "agnostic_blocks": 0, "heat_decay": 0.5, "capacity": capacity,
            "block_bytes": 1000, "model": "made-up", "config_hash": "none", **meta,
        },
    )  # fmt: skip
