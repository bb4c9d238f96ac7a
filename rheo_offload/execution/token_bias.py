"""The bias per token of a learned head: stored with the block, added to the logits, and what ranks blocks.

Where a method has one (`selection/learned_bias.py`), a layer's heat is the pooled bias of every block: it is written
here, once for a prompt and then a block at a time, and never decays. Plain torch on tensors of a few numbers a (row,
head); nothing waits for the device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.cache.kv_cache import StepTables
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


@dataclass(frozen=True, slots=True)
class Tails:
    """Where this step's tokens are, the same for every layer: int64, of the rows of a step."""

    block: torch.Tensor  # [B], the tail
    page: torch.Tensor  # [B], its page; scratch where the row sits the step out
    part: torch.Tensor  # [B], the part of the tail that the new token is in
    tokens: torch.Tensor  # [B, tokens of a part]
    pages: torch.Tensor  # [B, 3], of the tail and of the two blocks ahead of it
    begin: torch.Tensor  # [B, 1], parts of these three blocks that exist
    end: torch.Tensor
    has_before: torch.Tensor  # bool [B, 1], whether there is a block ahead of the tail

    @classmethod
    def of(cls, now: StepTables, block_size: int, parts: int) -> "Tails":
        """Compute them for blocks in `parts` parts."""
        lens, size = now.lens.long(), block_size // parts
        position = (lens - 1).clamp(min=0)
        block = position // block_size
        ids = block[:, None] + torch.arange(-2, 1, device=lens.device)
        pages = now.host_table.gather(1, ids.clamp(min=0)).clamp(min=0).long()
        part = position % block_size // size
        return cls(
            block=block,
            page=pages[:, 2] * (lens > 0),
            part=part,
            tokens=part[:, None] * size + torch.arange(size, device=lens.device),
            pages=pages,
            begin=(-ids[:, :1]).clamp(min=0) * parts,
            end=lens[:, None] // size - ids[:, :1] * parts,
            has_before=((lens > 0) & (block > 0))[:, None],
        )


def rank_decoded(selector: LearnedBias, layer: FullLayer, tails: Tails) -> None:
    """Note what the appended token adds: the mean of its part, and the rank of the block ahead of the tail.

    That block is closed, and its last window ends in the tail; the tail itself is always selected.
    """
    assert layer.unit_bias is not None and layer.bias_pool is not None
    per_head = (-1, layer.spec.num_kv_heads, 1)
    slot = layer.slot_of.gather(2, tails.block[:, None, None].expand(per_head)).clamp(min=0).long()
    # a part that is not complete holds anything, and nobody looks at it
    layer.unit_bias[tails.page, :, tails.part] = layer.bias_pool[slot, tails.tokens[:, None]].float().mean(-1)
    units = layer.unit_bias[tails.pages].transpose(1, 2)  # [B, Hkv, 3, W]
    before = (tails.block - 1).clamp(min=0)[:, None, None].expand(per_head)
    rank = selector.pool(units, tails.begin, tails.end)[..., 1]
    kept = torch.where(tails.has_before, rank, layer.heat.gather(2, before)[..., 0])
    layer.heat.scatter_(2, before, kept[..., None])


def _of(layer: FullLayer, call: AttentionCall) -> torch.Tensor:
    """Return the bias [B, Hkv, Q] of the new tokens."""
    if call.bias is None:
        raise CacheError(
            f"layer {layer.spec.layer_idx} keeps a bias per token, and its attention module computed none: the "
            "model's modules changed since it was offloaded; restore() and offload() it again"
        )
    return call.bias
