"""The bias per token of a learned head: stored with the block, added to the logits, and what ranks blocks.

Where a method has one (`selection/learned_bias.py`), a layer's heat is the pooled bias of every block: it is written
here for a prompt, and then a block a step by the op `rank_bias`; it never decays. Nothing waits for the device.
"""

from typing import TYPE_CHECKING, Any

import torch

from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.errors import CacheError
from rheo_offload.selection.learned_bias import LearnedBias
from rheo_offload.types import AttentionCall

if TYPE_CHECKING:
    from rheo_offload.execution.prefill import Chunk


def for_append(layer: FullLayer, call: AttentionCall) -> dict[str, Any]:
    """Return what `append` needs beyond keys and values; nothing where blocks carry no bias."""
    if layer.bias_pool is None:
        return {}
    return dict(bias_new=_of(layer, call)[:, :, 0], bias_host=layer.bias_host, bias_pool=layer.bias_pool)


def for_logits(call: AttentionCall, bias: torch.Tensor | None, name: str = "bias_pool") -> dict[str, Any]:
    """Return what an attention op needs to add `bias`; nothing where the logits take none."""
    return {} if call.bias_scale is None else {name: bias, "bias_scale": call.bias_scale}


def append_chunk(
    ops: Any, layer: FullLayer, call: AttentionCall, chunk: "Chunk", table: torch.Tensor
) -> None:
    """Store the bias of a chunk, and the means of the parts of blocks that it completes."""
    if layer.bias_pool is None or layer.bias_host is None:
        return
    # one number a token is a key of one channel
    new, host, pool = (t[..., None] for t in (_of(layer, call), layer.bias_host, layer.bias_pool))
    ops.append_chunk(new, new, chunk.start, table, host, host, pool, pool, layer.slot_of[chunk.rows])
    if layer.unit_bias is not None:
        ops.summarize_chunk(new, chunk.start, table, host, layer.unit_bias[..., None], summary_kind="mean")


def rank_prompt(selector: LearnedBias, layer: FullLayer, chunk: "Chunk", table: torch.Tensor) -> None:
    """Pool the bias of every block of the rows of a chunk."""
    assert layer.unit_bias is not None
    units = layer.unit_bias[table.clamp(min=0).long()].transpose(1, 2)  # [B, Hkv, N, W]
    end = chunk.lengths // (layer.layout.block_size // layer.bias_units)
    layer.heat[chunk.rows] = selector.pool(units, torch.zeros_like(end)[:, None], end[:, None])


def _of(layer: FullLayer, call: AttentionCall) -> torch.Tensor:
    """Return the bias [B, Hkv, Q] of the new tokens."""
    if call.bias is None:
        raise CacheError(
            f"layer {layer.spec.layer_idx} keeps a bias per token, and its attention module computed none: the "
            "model's modules changed since it was offloaded; restore() and offload() it again"
        )
    return call.bias
