"""Host-side moves on the residency tables: claim while there is room, drop, and the integrity check.

During a decode step only kernels write these tables (`append`, `resolve`). What is here runs between steps.
"""

import torch

from rheo_offload.cache.device_pool import FullLayer


def claim_in_order(layer: FullLayer, row: int, first_block: int, end_block: int) -> None:
    """Give blocks `[first_block, end_block)` of a row the slots of the same number, where those are free."""
    end_block = min(end_block, layer.capacity)
    if first_block >= end_block or row >= layer.sharing_rows:
        return
    ids = torch.arange(first_block, end_block, dtype=torch.int32, device=layer.device)
    slot_of = layer.slot_of[row, :, first_block:end_block]
    slots = layer.slot_base[row][:, None] + ids
    free = (layer.block_in[slots.long()] == -1) & (slot_of == -1)
    slot_of.copy_(torch.where(free, slots, slot_of))
    layer.block_in[slots.long()] = torch.where(free, ids, layer.block_in[slots.long()])


def drop_rows(layer: FullLayer, rows: torch.Tensor) -> None:
    """Forget everything resident of the given rows ([n] int64). Their blocks are loaded again when selected."""
    layer.slot_of[rows] = -1
    per_row = _per_row(layer, layer.block_in)
    chosen = torch.zeros(layer.rows, dtype=torch.bool, device=layer.device)
    chosen[rows] = True
    per_row.masked_fill_(chosen[: per_row.shape[0], None, None], -1)


def drop_blocks(
    layer: FullLayer,
    seq_lens: torch.Tensor,
    *,
    sink_blocks: int,
    fraction: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Drop a random share of the resident blocks that are neither sink nor tail: forced misses. Never waits."""
    block_in = _per_row(layer, layer.block_in)
    tail = (seq_lens[: layer.sharing_rows] - 1)[:, None, None] // layer.layout.block_size
    drop = (block_in >= sink_blocks) & (block_in != tail)
    if fraction < 1.0:
        drop &= torch.rand(drop.shape, generator=generator, device=drop.device) < fraction
    _clear(layer, drop)


def drop_from(layer: FullLayer, first_absent: torch.Tensor) -> None:
    """Drop the blocks at or beyond `first_absent[b]` of every row: they no longer exist."""
    _clear(layer, _per_row(layer, layer.block_in) >= first_absent[: layer.sharing_rows, None, None])


def _clear(layer: FullLayer, drop: torch.Tensor) -> None:
    """Free the slots where `drop` [sharing rows, Hkv, capacity] is true. Never waits: sizes do not depend on it."""
    dropped = torch.zeros_like(layer.block_in, dtype=torch.bool)
    _per_row(layer, dropped).copy_(drop)
    gone = dropped[
        layer.slot_of.clamp(min=0).long()
    ]  # absent blocks ask the scratch slot, which is never dropped
    layer.slot_of.masked_fill_(gone, -1)
    layer.block_in.masked_fill_(dropped, -1)


def _per_row(layer: FullLayer, per_slot: torch.Tensor) -> torch.Tensor:
    """View a per-slot table, without scratch and unshared slots, as [sharing rows, Hkv, capacity]."""
    shape = (layer.sharing_rows, layer.spec.num_kv_heads, layer.capacity)
    return per_slot[1 : 1 + shape[0] * shape[1] * shape[2]].view(shape)


def check_integrity(layer: FullLayer, seq_lens: torch.Tensor) -> None:
    """Check that `slot_of` and `block_in` are each other's inverse and stay inside their owners.

    Raises:
        AssertionError: they are not; the message names the layer and the table.
    """
    where = f"layer {layer.spec.layer_idx}"
    slot_of, block_in = layer.slot_of.cpu(), layer.block_in.cpu()
    per_row = _per_row(layer, layer.block_in).cpu()
    base = layer.slot_base.cpu()
    assert block_in[0] == -1, f"{where}: the scratch slot is in use"
    row, head, block = (slot_of >= 0).nonzero(as_tuple=True)
    slots = slot_of[row, head, block]
    local = slots - base[row, head]
    owned = layer.slot_count.cpu()[row, head]
    assert bool(((local >= 0) & (local < owned)).all()), f"{where}: slot_of leaves its owner's slots"
    assert torch.equal(block_in[slots.long()].long(), block), f"{where}: block_in does not answer slot_of"
    assert int((per_row >= 0).sum()) == int((block_in >= 0).sum()) == len(slots), (
        f"{where}: block_in holds blocks that slot_of does not know"
    )
    blocks = -(-seq_lens.cpu() // layer.layout.block_size)
    assert bool((block < blocks[row]).all()), f"{where}: a resident block lies beyond the row's length"
