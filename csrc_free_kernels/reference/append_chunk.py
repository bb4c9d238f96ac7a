"""A chunk of prompt tokens: write-through to the host, and to the pool where a block is resident."""

import torch
from torch import Tensor


def append_chunk(
    k: Tensor,
    v: Tensor,
    start: Tensor,
    host_table: Tensor,
    k_host: Tensor,
    v_host: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_of: Tensor,
) -> None:
    """Write token `i` of every row to position `start[b] + i`; negative positions are padding and dropped.

    Args:
        k: [B, Hkv, Q, D], any float dtype.
        v: [B, Hkv, Q, D].
        start: int32 [B], tokens.
        host_table: int32 [B, N]; every block that gets a token has a page.
        k_host: [P, Hkv, C, D], host memory, written in place.
        v_host: [P, Hkv, C, D], host memory, written in place.
        k_pool: [L, C, D], written in place where `slot_of >= 0`.
        v_pool: [L, C, D], likewise.
        slot_of: int32 [B, Hkv, N], not changed.
    """
    block_size = k_host.shape[2]
    for b, first in enumerate(start.tolist()):
        tokens = torch.arange(min(max(-first, 0), k.shape[2]), k.shape[2])
        block, offset = (first + tokens) // block_size, (first + tokens) % block_size
        pages = host_table[b].cpu()[block].long()
        slots = slot_of[b].cpu()[:, block].long()  # [Hkv, tokens]
        resident = slots >= 0
        slots, offsets = (
            slots[resident].to(k_pool.device),
            offset.expand_as(slots)[resident].to(k_pool.device),
        )
        resident = resident.to(k.device)
        for new, host, pool in ((k[b], k_host, k_pool), (v[b], v_host, v_pool)):
            new = new[:, tokens.to(new.device)]
            host[pages, :, offset] = new.transpose(0, 1).to(host.device)
            pool[slots, offsets] = new[resident].to(pool.device)
