"""A run of blocks of every (row, head), side by side, for exact attention over history in rounds."""

from torch import Tensor


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
        host_blocks: [P, Hkv, E], host memory, a block contiguous.
        pool_blocks: [L, E].
        staging: [B, Hkv, M, E], written in place.
        staged_total: int64 [1], grows by the number of blocks read from the host.
        block_size: C, tokens.
    """
    for b, length in enumerate(hist_lens.tolist()):
        num = min(-(-length // block_size) - first_block, staging.shape[2])
        if num <= 0:
            continue
        blocks = slice(first_block, first_block + num)
        slots = slot_of[b, :, blocks].long()  # [Hkv, num]
        resident = slots >= 0
        absent = ~resident
        heads, order = absent.cpu().nonzero(as_tuple=True)
        pages = host_table[b, blocks].cpu().long()[order]
        staging[b, :, :num][resident] = pool_blocks[slots[resident]]
        staging[b, :, :num][absent] = host_blocks[pages, heads].to(staging.device)
        staged_total += len(heads)
