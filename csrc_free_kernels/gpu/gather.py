"""The load list, copied by a few CTAs that read pinned host memory directly."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 CTAs saturate a PCIe 5 x16 link (50.3 GB/s, 8 give 48.0, H100) and leave the other SMs to attention.
NUM_CTAS = 16
NUM_WARPS = 8
# 32 KiB a tile is 128 B a thread: enough under way for long lists too. 8192 blocks of 32 KiB on an H100: 46.6 GB/s
# with tiles of 8 KiB, 50.0 with 32 KiB.
TILE_WORDS = 8192


def as_words(blocks: Tensor) -> Tensor:
    """View blocks of any float dtype as 4-byte words; RuntimeError when a block is not made of them."""
    return blocks.view(torch.int32)


def tile_of(words: int) -> int:
    """Words that one tile copies, for blocks of `words`."""
    return min(TILE_WORDS, triton.next_power_of_2(words))


@triton.jit
def copy_tile(p_src, p_dst, i_tile, WORDS: tl.constexpr, TILE: tl.constexpr):
    """Copy words `i_tile * TILE ..` of one block of WORDS words."""
    o_word = i_tile * TILE + tl.arange(0, TILE)
    m_word = o_word < WORDS
    tl.store(p_dst + o_word, tl.load(p_src + o_word, mask=m_word, other=0), mask=m_word)


# grid (NUM_CTAS,); the programs deal out the tiles of all loads in turn
@triton.jit
def gather_kernel(
    load_src,  # [max_loads]
    load_dst,  # [max_loads]
    load_count,  # [1]
    host,  # [P, HKV, WORDS]
    pool,  # [L, WORDS]
    loaded_total,  # [1]
    stride_page,
    stride_head,
    stride_slot,
    HKV: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    i_program = tl.program_id(0)
    count = tl.load(load_count)
    if i_program == 0:
        tl.store(loaded_total, tl.load(loaded_total) + count)
    tiles = (WORDS + TILE - 1) // TILE
    for i in range(i_program, count * tiles, PROGRAMS):
        src = tl.load(load_src + i // tiles)
        page, head = (src // HKV).to(tl.int64), (src % HKV).to(tl.int64)
        slot = tl.load(load_dst + i // tiles).to(tl.int64)
        p_src = host + page * stride_page + head * stride_head
        copy_tile(p_src, pool + slot * stride_slot, i % tiles, WORDS, TILE)


def gather(
    load_src: Tensor,
    load_dst: Tensor,
    load_count: Tensor,
    host_blocks: Tensor,
    pool_blocks: Tensor,
    loaded_total: Tensor,
) -> None:
    """Copy host block `load_src[i]` to pool slot `load_dst[i]` for `i < load_count[0]`.

    Runs on the current stream with a fixed grid; the count is read on the device.

    Args:
        load_src: int32 [max_loads], `page * Hkv + head`.
        load_dst: int32 [max_loads], slots, all different.
        load_count: int32 [1].
        host_blocks: [P, Hkv, E], pinned host memory, a block contiguous and a multiple of 4 bytes.
        pool_blocks: [L, E], written in place.
        loaded_total: int64 [1], grows by `load_count`.
    """
    host, pool = as_words(host_blocks), as_words(pool_blocks)
    words = host.shape[2]
    gather_kernel[(NUM_CTAS,)](
        load_src,
        load_dst,
        load_count,
        host,
        pool,
        loaded_total,
        host.stride(0),
        host.stride(1),
        pool.stride(0),
        HKV=host.shape[1],
        WORDS=words,
        TILE=tile_of(words),
        PROGRAMS=NUM_CTAS,
        num_warps=NUM_WARPS,
    )
