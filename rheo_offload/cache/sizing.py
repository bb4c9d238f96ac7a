"""How much memory a run needs, from shapes alone: used to size the cache and by `rheo plan`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rheo_offload.cache.layout import PageLayout, ring_tokens
from rheo_offload.errors import DeviceMemoryError
from rheo_offload.types import LayerSpec

logger = logging.getLogger("rheo_offload")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by purpose. Everything but `host_bytes` is on the device."""

    rows: int
    max_blocks: int
    block_budget: int
    capacity_blocks: int
    """Slots per (row, KV head) of an offloaded layer."""
    pool_bytes: int
    pool_bytes_per_capacity: int
    """What one more slot per (row, KV head) costs over all layers."""
    ring_bytes: int
    summary_bytes: int
    table_bytes: int
    staging_bytes: int
    workspace_bytes: int
    """Activations of one prefill piece (estimate)."""
    host_bytes: int
    page_bytes: int
    dense_kv_bytes: int
    """What a dense cache of the same rows and length would hold on the device."""

    @property
    def device_kv_bytes(self) -> int:
        """Device memory of the cache itself: pool, rings, summaries, tables."""
        return self.pool_bytes + self.ring_bytes + self.summary_bytes + self.table_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory beyond the weights."""
        return self.device_kv_bytes + self.staging_bytes + self.workspace_bytes


def capacity_floor(block_budget: int, max_blocks: int, capacity_ratio: float) -> int:
    """Return the fewest slots per (row, KV head): ratio x budget, room for the tail, at most one per block."""
    return min(max_blocks, max(block_budget + 1, int(-(-block_budget * capacity_ratio // 1))))


def prefill_workspace_bytes(
    specs: Sequence[LayerSpec], *, chunk_tokens: int, hidden_size: int, intermediate_size: int, itemsize: int
) -> int:
    """Estimate the activations that are alive at once while one prefill piece runs through a layer."""
    q_width = max(s.num_q_heads * s.head_dim for s in specs)
    kv_width = max(s.num_kv_heads * s.head_dim for s in specs)
    per_token = (
        itemsize * (6 * hidden_size + 3 * intermediate_size + 3 * q_width + 4 * kv_width) + 12 * q_width
    )
    return chunk_tokens * per_token


def plan_memory(
    specs: Sequence[LayerSpec],
    *,
    rows: int,
    max_blocks: int,
    block_size: int,
    block_budget: int,
    capacity_ratio: float,
    summary_width: int,
    stage_blocks: int,
    dtype: torch.dtype,
    workspace_bytes: int = 0,
    capacity_blocks: int | None = None,
    has_bias: bool = False,
    bias_units: int = 0,
    group_blocks: int = 0,
) -> MemoryPlan:
    """Add up the memory of a cache.

    Args:
        specs: the model's attention layers.
        rows: rows of the batch.
        max_blocks: logical blocks the longest row will hold.
        block_size: tokens per block.
        block_budget: blocks attended to per (row, KV head).
        capacity_ratio: slots over budget, used when `capacity_blocks` is None.
        summary_width: summary vectors of D elements per block, mean values included (0 when none are kept).
        stage_blocks: blocks per (row, head) of the staging buffer, which holds one row at a time.
        dtype: of keys and values.
        workspace_bytes: estimate of `prefill_workspace_bytes`.
        capacity_blocks: slots per (row, KV head); the floor when None.
        has_bias: whether a bias per token travels with every block.
        bias_units: parts of a block whose mean bias (fp32) is kept on the device.
        group_blocks: blocks of a group whose bounds are kept on the device (`selection.index`); 0: none are.
    """
    capacity = capacity_blocks or capacity_floor(block_budget, max_blocks, capacity_ratio)
    page = PageLayout.of(specs, block_size, dtype, has_bias=has_bias)
    full = [s for s in specs if not s.is_sliding]
    sliding = [s for s in specs if s.window is not None]
    per_slot = sum(s.num_kv_heads * page.blocks[s.layer_idx].block_bytes for s in full) * rows
    heads = sum(s.num_kv_heads for s in full)
    pages = rows * max_blocks + 1
    bounds = 2 * rows * -(-max_blocks // group_blocks) if group_blocks else 0  # vectors a KV head
    token_bytes = {s.layer_idx: 2 * s.num_kv_heads * s.head_dim * dtype.itemsize for s in specs}
    return MemoryPlan(
        rows=rows,
        max_blocks=max_blocks,
        block_budget=block_budget,
        capacity_blocks=capacity,
        pool_bytes=per_slot * capacity,
        pool_bytes_per_capacity=per_slot,
        ring_bytes=sum(
            rows * ring_tokens(s.window or 0, block_size) * token_bytes[s.layer_idx] for s in sliding
        ),
        summary_bytes=sum(
            s.num_kv_heads
            * ((pages * summary_width + bounds) * s.head_dim * dtype.itemsize + 4 * pages * bias_units)
            for s in full
        ),
        # slot_of, heat per (row, head, block); block_in, last_used per slot
        table_bytes=heads * rows * (8 * max_blocks + 8 * capacity) + 4 * rows * max_blocks,
        staging_bytes=max((s.num_kv_heads * page.blocks[s.layer_idx].block_bytes for s in full), default=0)
        * stage_blocks,
        workspace_bytes=workspace_bytes,
        host_bytes=pages * page.page_bytes,
        page_bytes=page.page_bytes,
        dense_kv_bytes=rows * max_blocks * block_size * sum(token_bytes.values()),
    )


def allocate_shrinking(allocate: Callable[[int], T], capacity: int, floor: int) -> T:
    """Call `allocate(capacity)`, with fewer slots (down to `floor`) when the device is fuller than it said.

    Raises:
        DeviceMemoryError: not even `floor` slots fit.
    """
    while True:
        try:
            return allocate(capacity)
        except torch.cuda.OutOfMemoryError as error:
            smaller = max(floor, capacity * 7 // 8)
            if smaller == capacity:
                raise DeviceMemoryError(
                    f"the device has no room for {capacity} slots per KV head, the least this budget needs; lower "
                    "selection.token_budget or the batch"
                ) from error
            logger.warning("device pool: no room for %d slots per KV head, trying %d", capacity, smaller)
            capacity = smaller
            torch.cuda.empty_cache()
