"""numba `rank_bias`: what the token just appended says of the blocks behind it, by its bias."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import as_numpy, code_of, decode
from csrc_free_kernels.reference.rank_bias import Pooling, check_pooling


# Serial: a few numbers a (row, head).
@nb.njit(cache=True)
def rank_bias_kernel(seq_lens, host_table, slot_of, bias_pool, unit_bias, heat, C, windows, code):
    rows, heads, _ = slot_of.shape
    width = unit_bias.shape[2]
    size = C // width
    for i in range(rows * heads):
        b, h = i // heads, i % heads
        if seq_lens[b] <= 0:
            continue
        block, offset = (seq_lens[b] - 1) // C, (seq_lens[b] - 1) % C
        slot = slot_of[b, h, block]
        if (offset + 1) % size == 0 and slot >= 0:
            total = np.float32(0)
            for t in range(offset + 1 - size, offset + 1):
                total += decode(bias_pool[slot, t], code)
            unit_bias[host_table[b, block], h, offset // size] = total / np.float32(size)
        if block == 0:
            continue
        if windows:
            best = np.float32(-np.inf)
            end = min(block * width, seq_lens[b] // size - 1)
            for left in range(max((block - 1) * width - 1, 0), end):
                right = left + 1
                x = unit_bias[host_table[b, left // width], h, left % width]
                y = unit_bias[host_table[b, right // width], h, right % width]
                best = max(best, (x + y) / np.float32(2))
            heat[b, h, block - 1] = best
        else:
            parts = np.sort(unit_bias[host_table[b, block - 1], h])
            heat[b, h, block - 1] = parts[(width - 1) // 2]


def rank_bias(
    seq_lens: Tensor,
    host_table: Tensor,
    slot_of: Tensor,
    bias_pool: Tensor,
    unit_bias: Tensor,
    heat: Tensor,
    *,
    block_size: int,
    pooling: Pooling,
) -> None:
    """Note the mean bias of the part that the new token completes, and rank the block ahead of the tail by its parts.

    Arguments and errors as in `csrc_free_kernels/reference/rank_bias.py`.
    """
    check_pooling(pooling)
    rank_bias_kernel(
        seq_lens.numpy(), host_table.numpy(), slot_of.numpy(), as_numpy(bias_pool), unit_bias.numpy(), heat.numpy(),
        block_size, pooling == "windows", code_of(bias_pool),
    )  # fmt: skip
