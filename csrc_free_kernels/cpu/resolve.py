"""numba `resolve`: selection meets residency. Serial: a (row, head) is less work than starting a thread."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.victims import victims


@nb.njit(cache=True)
def resolve_kernel(
    selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base, slot_count,
    step, hit_slots, miss_slots, load_src, load_dst, load_at, load_count, counters, block_size, sink_blocks,
    recent_blocks,
):  # fmt: skip
    num_rows, num_kv_heads, width = selected_blocks.shape
    missing = np.empty(width, np.int32)
    free = np.empty(width, np.int64)
    now = step[0]
    hit_slots[:] = -1
    miss_slots[:] = -1
    for i in range(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        if seq_lens[b] == 0:
            continue
        tail = (seq_lens[b] - 1) // block_size
        counted = counters[b, h]
        num_missing = 0
        for s in range(num_selected[b, h]):
            block = selected_blocks[b, h, s]
            slot = slot_of[b, h, block]
            if slot >= 0:
                hit_slots[b, h, s] = slot
                last_used[slot] = now
            else:
                missing[num_missing] = s
                num_missing += 1
            if block != tail:
                forced = block < sink_blocks or block > tail - recent_blocks
                counted[0] += 1
                counted[1] += slot >= 0
                counted[2] += forced
                counted[3] += forced and slot >= 0
        if num_missing == 0:
            continue
        found = victims(
            block_in, last_used, slot_base[b, h], slot_count[b, h], now, tail, sink_blocks, num_missing, free
        )
        for r in range(found):
            slot, s = free[r], missing[r]
            block, old = selected_blocks[b, h, s], block_in[slot]
            if old >= 0:
                slot_of[b, h, old] = -1
                counted[4] += 1
            slot_of[b, h, block], block_in[slot], last_used[slot] = slot, block, now
            miss_slots[b, h, s] = slot
            load_src[load_count[0]] = host_table[b, block] * num_kv_heads + h
            load_dst[load_count[0]] = slot
            load_at[load_count[0]] = i * width + r
            load_count[0] += 1


def resolve(
    selected_blocks: Tensor,
    num_selected: Tensor,
    seq_lens: Tensor,
    host_table: Tensor,
    slot_of: Tensor,
    block_in: Tensor,
    last_used: Tensor,
    slot_base: Tensor,
    slot_count: Tensor,
    step: Tensor,
    hit_slots: Tensor,
    miss_slots: Tensor,
    load_src: Tensor,
    load_dst: Tensor,
    load_at: Tensor,
    load_count: Tensor,
    counters: Tensor,
    *,
    block_size: int,
    sink_blocks: int,
    recent_blocks: int,
) -> None:
    """Find the slots of selected blocks; give absent ones the slots of victims and list them for loading.

    Arguments as in `csrc_free_kernels/reference/resolve.py`. The load list is in (row, head) order.
    """
    tensors = (
        selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base,
        slot_count, step, hit_slots, miss_slots, load_src, load_dst, load_at, load_count, counters,
    )  # fmt: skip
    resolve_kernel(*[t.numpy() for t in tensors], block_size, sink_blocks, recent_blocks)
