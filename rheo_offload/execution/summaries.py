"""Summaries that a method makes itself (kind `own`), from the keys of whole blocks; plain torch on the device."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.cache.kv_cache import StepTables
from rheo_offload.selection.base import Summarizer

if TYPE_CHECKING:
    from rheo_offload.execution.executor import Executor
    from rheo_offload.execution.prefill import Chunk


def summarize_tails(ex: "Executor", layer: FullLayer, now: StepTables) -> None:
    """Summarise the block of every row's newest token, after `append`: part of a captured step.

    It is done in every step, since which rows close a block is known to the device only. An open block's summary is
    wrong and not read; the step that closes the block writes the right one. Inactive rows write to scratch page 0.
    """
    assert layer.summary is not None
    tails = (now.lens - 1).clamp_min(0) // ex.cache.block_size
    index = tails.long()[:, None]
    slots = layer.slot_of.gather(2, index[:, None].expand(-1, layer.slot_of.shape[1], 1))[..., 0]
    keys = layer.k_pool[slots.clamp_min(0).long()]  # [B, Hkv, C, D]
    pages = torch.where(now.lens > 0, now.host_table.gather(1, index)[:, 0], 0).clamp_min(0)
    layer.summary[pages.long()] = _summarizer(ex, layer).summarize(keys, tails)


def summarize_chunk(ex: "Executor", layer: FullLayer, k: Tensor, chunk: "Chunk") -> None:
    """Summarise the blocks that a chunk of the prompt completed.

    Args:
        ex: the executor.
        layer: the layer, its summaries written in place.
        k: [B, Hkv, Q, D], keys of the chunk after RoPE; a row's new tokens are its last ones.
        chunk: where they are.
    """
    assert layer.summary is not None
    size = ex.cache.block_size
    for b, row in enumerate(range(chunk.rows.start, chunk.rows.stop)):
        before, after = chunk.before[b], chunk.after[b]
        first, end = before // size, after // size
        if first == end:
            continue
        keys = k[b, :, k.shape[2] - (after - before) :]
        if before % size:
            keys = torch.cat((_open_block(ex, layer, b, chunk, first)[:, : before % size], keys), 1)
        whole = keys[:, : (end - first) * size].unflatten(1, (-1, size)).transpose(0, 1)
        blocks = torch.arange(first, end, device=k.device)
        pages = ex.cache.host_table[row, first:end].long()
        layer.summary[pages] = _summarizer(ex, layer).summarize(whole, blocks)


def _open_block(ex: "Executor", layer: FullLayer, b: int, chunk: "Chunk", block: int) -> Tensor:
    """Return the keys [Hkv, C, D] of the block in which row `b` ended before the chunk."""
    rows = slice(chunk.rows.start + b, chunk.rows.start + b + 1)
    layout = layer.layout
    shape = (1, layer.spec.num_kv_heads, 1, layout.elements)
    staging = torch.empty(shape, dtype=layout.dtype, device=layer.device)
    ex.ops.stage(
        block, chunk.history[b : b + 1], ex.cache.host_table[rows], layer.slot_of[rows],
        layer.host_blocks, layer.pool_blocks, staging, layer.traffic_of("prefill"),
        block_size=ex.cache.block_size,
    )  # fmt: skip
    return layout.split(staging)[0][0, :, 0]


def _summarizer(ex: "Executor", layer: FullLayer) -> Summarizer:
    return cast(Summarizer, ex.selector_of(layer))
