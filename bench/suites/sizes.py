"""Device memory of a case by arithmetic, before anything is allocated."""

import torch

from bench.lab import SESSION_BLOCKS, Lab
from bench.shapes import model_bytes
from rheo_offload.cache.sizing import MemoryPlan, plan_memory
from rheo_offload.model.specs import layer_specs
from rheo_offload.selection.index import make_index
from rheo_offload.selection.learned_bias import bias_sizes
from rheo_offload.selection.policy import make_selector, mean_values

RESERVE_BYTES = 3 * 2**29  # graphs, cuBLAS workspaces, logits, allocator fragments
CONTEXT_BYTES = 3 * 2**28  # what the driver keeps for the process, outside torch's allocator


def plan(
    lab: Lab,
    batch: int,
    context: int,
    *,
    capacity_blocks: int | None = None,
    capacity_ratio: float | None = None,
) -> MemoryPlan:
    """Return what a cache of this case takes, at the configured capacity or another one."""
    config = lab.resolved(context)
    size, selection = config.cache.block_size, config.selection
    selector = make_selector(selection.method, selection.params, block_size=size)
    has_bias, bias_units = bias_sizes(selector, size)
    index = make_index(selector, selection, block_size=size)
    max_blocks = context // size + SESSION_BLOCKS
    return plan_memory(
        layer_specs(lab.model.config),
        rows=batch,
        max_blocks=max_blocks,
        block_size=size,
        block_budget=int(selection.token_budget) // size,
        capacity_ratio=capacity_ratio or config.cache.capacity_ratio,
        summary_width=selector.summary_width(size)
        + mean_values(selector, selection.remainder, block_size=size),
        stage_blocks=0,
        dtype=lab.model.dtype,
        capacity_blocks=capacity_blocks,
        has_bias=has_bias,
        bias_units=bias_units,
        group_blocks=index.group_blocks_of(max_blocks) if index else 0,
    )


def pool_bytes(lab: Lab, batch: int, context: int, *, everything: bool = False) -> int:
    """Return the device memory of a cache at the configured capacity, or with a slot for every block."""
    blocks = context // lab.config.cache.block_size + SESSION_BLOCKS
    return plan(lab, batch, context, capacity_blocks=blocks if everything else None).device_kv_bytes


def device_bytes(lab: Lab) -> int:
    """Return the memory of the device that a process can have; on the CPU a number that nothing reaches."""
    if lab.device.type != "cuda":
        return 2**50
    return int(torch.cuda.get_device_properties(lab.device).total_memory) - CONTEXT_BYTES


def fits_together(lab: Lab, nbytes: int) -> bool:
    """Whether caches of `nbytes` fit beside the weights."""
    return model_bytes(lab.model) + nbytes + 2 * RESERVE_BYTES <= device_bytes(lab)
