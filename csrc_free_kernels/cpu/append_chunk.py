"""A chunk of prompt tokens: write-through to the host, and to the pool where a block is resident."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.gather import copy_flat, flat


# One iteration: a (row, head, token). new, host, pool: flat arrays; strides in elements.
@nb.njit(cache=True, parallel=True)
def append_chunk_kernel(
    new, shape, strides, start, host_table, host, host_strides, pool, pool_strides, slot_of, block_size
):
    rows, heads, tokens, dim = shape
    for i in nb.prange(rows * heads * tokens):
        b, h, t = i // (heads * tokens), i // tokens % heads, i % tokens
        position = start[b] + t
        if position >= 0:
            block, offset = position // block_size, position % block_size
            o_new = b * strides[0] + h * strides[1] + t * strides[2]
            page = np.int64(host_table[b, block])
            o_host = page * host_strides[0] + h * host_strides[1] + offset * host_strides[2]
            copy_flat(new, o_new, host, o_host, dim)
            slot = np.int64(slot_of[b, h, block])
            if slot >= 0:
                copy_flat(new, o_new, pool, slot * pool_strides[0] + offset * pool_strides[1], dim)


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
        k: [B, Hkv, Q, D], last dim contiguous.
        v: [B, Hkv, Q, D], last dim contiguous.
        start: int32 [B], tokens.
        host_table: int32 [B, N]; every block that gets a token has a page.
        k_host: [P, Hkv, C, D], written in place.
        v_host: [P, Hkv, C, D], written in place.
        k_pool: [L, C, D], written in place where `slot_of >= 0`.
        v_pool: [L, C, D], likewise.
        slot_of: int32 [B, Hkv, N], not changed.
    """
    tables = start.numpy(), host_table.numpy()
    for new, host, pool in ((k, k_host, k_pool), (v, v_host, v_pool)):
        assert new.stride(3) == host.stride(3) == pool.stride(2) == 1
        append_chunk_kernel(
            flat(new),
            tuple(new.shape),
            new.stride(),
            *tables,
            flat(host),
            host.stride(),
            flat(pool),
            pool.stride(),
            slot_of.numpy(),
            host.shape[2],
        )
