"""The load list: copy missed blocks from the host store to their pool slots."""

import numba as nb
import numpy as np
import torch
from torch import Tensor

from csrc_free_kernels.cpu.bits import as_numpy


def flat(t: Tensor) -> np.ndarray:
    """View the memory a strided tensor spans as one contiguous array (16-bit floats as uint16).

    Kernels index it with the tensor's own strides: a copy loop is vectorised over a contiguous array only.
    """
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return as_numpy(t.as_strided((span,), (1,)))


@nb.njit(cache=True)
def copy_flat(src, i_src, dst, i_dst, num):
    """Copy `num` elements between flat arrays."""
    for i in range(num):
        dst[i_dst + i] = src[i_src + i]


# One iteration: a block. host, pool: flat arrays of words; strides in words.
@nb.njit(cache=True, parallel=True)
def gather_kernel(
    load_src, load_dst, load_count, host, host_strides, pool, slot_stride, heads, words, loaded_total
):
    loaded_total[0] += load_count[0]
    if load_count[0] == 0:
        return
    for i in nb.prange(load_count[0]):
        page, head = np.int64(load_src[i] // heads), np.int64(load_src[i] % heads)
        o_src = page * host_strides[0] + head * host_strides[1]
        copy_flat(host, o_src, pool, np.int64(load_dst[i]) * slot_stride, words)


def gather(
    load_src: Tensor,
    load_dst: Tensor,
    load_count: Tensor,
    host_blocks: Tensor,
    pool_blocks: Tensor,
    loaded_total: Tensor,
) -> None:
    """Copy host block `load_src[i]` to pool slot `load_dst[i]` for `i < load_count[0]`.

    Args:
        load_src: int32 [max_loads], `page * Hkv + head`.
        load_dst: int32 [max_loads], slots, all different.
        load_count: int32 [1].
        host_blocks: [P, Hkv, E], a block contiguous and a multiple of 4 bytes.
        pool_blocks: [L, E], written in place.
        loaded_total: int64 [1], grows by `load_count`.
    """
    host, pool = host_blocks.view(torch.int32), pool_blocks.view(torch.int32)
    gather_kernel(
        load_src.numpy(),
        load_dst.numpy(),
        load_count.numpy(),
        flat(host),
        host.stride(),
        flat(pool),
        pool.stride(0),
        host.shape[1],
        host.shape[2],
        loaded_total.numpy(),
    )
