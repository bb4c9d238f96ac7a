"""The victim rule: which slots of a (row, head) are given up first. Shared by `append` and `resolve`."""

import torch
from torch import Tensor


def victims(
    block_in: Tensor,
    last_used: Tensor,
    base: int,
    count: int,
    step: int,
    tail_block: int,
    sink_blocks: int,
    num: int,
) -> Tensor:
    """Return the `num` first victims among the slots `base .. base + count - 1`, ascending by slot.

    Free slots come first, lowest index first; then resident blocks by smallest (last_used, block id). A
    resident slot is never a victim when its block is below `sink_blocks` or is `tail_block`, or when
    `last_used == step`; what `last_used` says of a free slot does not matter.

    Args:
        block_in: [L] int32, slot -> logical block, -1 = free.
        last_used: [L] int32, decode step that selected the slot's block last.
        base, count: the slots of the (row, head).
        step: number of this decode step.
        tail_block: logical block that must stay.
        sink_blocks: blocks below this number must stay.
        num: how many victims are wanted.

    Returns:
        int64 slot ids on the CPU, `num` of them or as many as there are candidates.
    """
    blocks, used = block_in[base : base + count].tolist(), last_used[base : base + count].tolist()
    order = []
    for i in range(count):
        if blocks[i] < 0:
            order.append((0, 0, i, base + i))
        elif blocks[i] >= sink_blocks and blocks[i] != tail_block and used[i] != step:
            order.append((1, used[i], blocks[i], base + i))
    return torch.tensor(sorted(slot for *_, slot in sorted(order)[:num]), dtype=torch.int64)
