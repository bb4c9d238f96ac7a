"""A run of blocks of every (row, head), side by side, for exact attention over history in rounds."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.gather import NUM_WARPS, as_words, copy_tile, tile_of

# Resident blocks are copied inside the GPU, which takes more CTAs than the link does.
MAX_CTAS = 64


# grid (programs,); the programs deal out the tiles of all B * HKV * M blocks in turn
@triton.jit(do_not_specialize=["first_block", "num_blocks", "num_tiles"])
def stage_kernel(
    first_block,
    hist_lens,  # [B]
    host_table,  # [B, N]
    slot_of,  # [B, HKV, N]
    host,  # [P, HKV, WORDS]
    pool,  # [L, WORDS]
    staging,  # [B, HKV, M, WORDS]
    staged_total,  # [1]
    num_blocks,  # M
    num_tiles,  # B * HKV * M * tiles of a block
    stride_table,
    stride_slot_row,
    stride_slot_head,
    stride_page,
    stride_head,
    stride_slot,
    stride_stage_row,
    stride_stage_head,
    stride_stage_block,
    C: tl.constexpr,
    HKV: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    tiles: tl.constexpr = (WORDS + TILE - 1) // TILE
    for i in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        i_tile, i_block = i % tiles, i // tiles
        i_j = (i_block % num_blocks).to(tl.int64)
        i_h = (i_block // num_blocks % HKV).to(tl.int64)
        i_b = (i_block // num_blocks // HKV).to(tl.int64)
        block = first_block + i_j
        if block * C < tl.load(hist_lens + i_b):
            slot = tl.load(slot_of + i_b * stride_slot_row + i_h * stride_slot_head + block).to(tl.int64)
            p_dst = staging + i_b * stride_stage_row + i_h * stride_stage_head + i_j * stride_stage_block
            if slot >= 0:
                copy_tile(pool + slot * stride_slot, p_dst, i_tile, WORDS, TILE)
            else:
                page = tl.load(host_table + i_b * stride_table + block).to(tl.int64)
                copy_tile(host + page * stride_page + i_h * stride_head, p_dst, i_tile, WORDS, TILE)
                if i_tile == 0:
                    tl.atomic_add(staged_total, 1)


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

    The others come from the host, read by the kernel itself. Runs on the current stream.

    Args:
        first_block: logical block of `staging[:, :, 0]`.
        hist_lens: int32 [B], tokens; blocks that start at or beyond it are left alone.
        host_table: int32 [B, N].
        slot_of: int32 [B, Hkv, N].
        host_blocks: [P, Hkv, E], pinned host memory, a block contiguous and a multiple of 4 bytes.
        pool_blocks: [L, E].
        staging: [B, Hkv, M, E], written in place, a block contiguous.
        staged_total: int64 [1], grows by the number of blocks read from the host.
        block_size: C, tokens.
    """
    host, pool, out = as_words(host_blocks), as_words(pool_blocks), as_words(staging)
    rows, heads, num_blocks, words = out.shape
    tile = tile_of(words)
    num_tiles = rows * heads * num_blocks * triton.cdiv(words, tile)
    stage_kernel[(min(MAX_CTAS, num_tiles),)](
        first_block,
        hist_lens,
        host_table,
        slot_of,
        host,
        pool,
        out,
        staged_total,
        num_blocks,
        num_tiles,
        host_table.stride(0),
        slot_of.stride(0),
        slot_of.stride(1),
        host.stride(0),
        host.stride(1),
        pool.stride(0),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        C=block_size,
        HKV=heads,
        WORDS=words,
        TILE=tile,
        num_warps=NUM_WARPS,
    )
