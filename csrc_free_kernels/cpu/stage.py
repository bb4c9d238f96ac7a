"""A run of blocks of every (row, head), side by side, for exact attention over history in rounds."""

import numba as nb
import numpy as np
import torch
from torch import Tensor

from csrc_free_kernels.cpu.gather import copy_flat, flat


# One iteration: a (row, head, block). host, pool, staging: flat arrays of words; strides in words.
@nb.njit(cache=True, parallel=True)
def stage_kernel(
    first_block, hist_lens, host_table, slot_of, host, host_strides, pool, pool_strides, staging, shape,
    strides, staged_total, block_size,
):  # fmt: skip
    rows, heads, blocks, words = shape
    from_host = 0
    for i in nb.prange(rows * heads * blocks):
        b, h, j = i // (heads * blocks), i // blocks % heads, i % blocks
        block = first_block + j
        if block * block_size < hist_lens[b]:
            o_dst = b * strides[0] + h * strides[1] + j * strides[2]
            slot = np.int64(slot_of[b, h, block])
            if slot >= 0:
                copy_flat(pool, slot * pool_strides[0], staging, o_dst, words)
            else:
                page = np.int64(host_table[b, block])
                copy_flat(host, page * host_strides[0] + h * host_strides[1], staging, o_dst, words)
                from_host += 1
    staged_total[0] += from_host


def stage(
    first_block: int,
    hist_lens: Tensor,
    host_table: Tensor,
    slot_of: Tensor,
    host_blocks: Tensor,
    pool_blocks: Tensor,
    staging: Tensor,
    staged_total: Tensor,
    *,
    block_size: int,
) -> None:
    """Copy blocks `first_block .. first_block + M - 1` into `staging`, from the pool where resident.

    The others come from the host.

    Args:
        first_block: logical block of `staging[:, :, 0]`.
        hist_lens: int32 [B], tokens; blocks that start at or beyond it are left alone.
        host_table: int32 [B, N].
        slot_of: int32 [B, Hkv, N].
        host_blocks: [P, Hkv, E], a block contiguous and a multiple of 4 bytes.
        pool_blocks: [L, E].
        staging: [B, Hkv, M, E], written in place, a block contiguous.
        staged_total: int64 [1], grows by the number of blocks read from the host.
        block_size: C, tokens.
    """
    host, pool, out = (t.view(torch.int32) for t in (host_blocks, pool_blocks, staging))
    stage_kernel(
        first_block,
        hist_lens.numpy(),
        host_table.numpy(),
        slot_of.numpy(),
        flat(host),
        host.stride(),
        flat(pool),
        pool.stride(),
        flat(out),
        tuple(out.shape),
        out.stride(),
        staged_total.numpy(),
        block_size,
    )
