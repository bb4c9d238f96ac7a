"""The victim rule for numba kernels (see reference/victims.py for its meaning)."""

import numba as nb
import numpy as np

# key of a slot that must stay; every candidate's key is smaller
NEVER = np.int64(2**62)


@nb.njit(cache=True)
def victim_key(block, used, i, step, tail_block, sink_blocks):
    """Order of a slot: smaller goes first. `i` is its index within the (row, head); keys are unique."""
    if block < 0:
        return np.int64(i)
    if block < sink_blocks or block == tail_block or used == step:
        return NEVER
    return (np.int64(used) + 1) * np.int64(2**31) + np.int64(block)


@nb.njit(cache=True)
def oldest_slot(block_in, last_used, base, count, step, tail_block, sink_blocks):
    """The first victim, or -1 when there is no candidate."""
    best, slot = NEVER, np.int64(-1)
    for i in range(count):
        key = victim_key(block_in[base + i], last_used[base + i], i, step, tail_block, sink_blocks)
        if key < best:
            best, slot = key, np.int64(base + i)
    return slot


@nb.njit(cache=True)
def victims(block_in, last_used, base, count, step, tail_block, sink_blocks, num, out):
    """Write the `num` first victims to `out` (integers), ascending by slot; return how many there are.

    One pass that keeps the best `num` so far in key order, so it costs count + (insertions * num).
    """
    found = 0
    worst = NEVER
    for i in range(count):
        key = victim_key(block_in[base + i], last_used[base + i], i, step, tail_block, sink_blocks)
        if key == NEVER or num == 0 or (found == num and key > worst):
            continue
        at = found if found < num else num - 1
        found = at + 1
        while at > 0:
            before = out[at - 1]
            if (
                victim_key(block_in[before], last_used[before], before - base, step, tail_block, sink_blocks)
                < key
            ):
                break
            out[at] = before
            at -= 1
        out[at] = base + i
        last = out[found - 1]
        worst = victim_key(block_in[last], last_used[last], last - base, step, tail_block, sink_blocks)
    out[:found].sort()
    return found
