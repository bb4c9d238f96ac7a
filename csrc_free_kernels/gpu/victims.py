"""The victim rule for Triton kernels (see reference/victims.py for its meaning).

A slot's place in the order is one int64 key: the local index for a free slot, (last_used + 1) * id_range +
block for a resident one, `NEVER` for one that must stay. Keys are unique, so "the `num` first victims" are
the slots with a key at or below a threshold. `id_range` is a number that local indices and block ids stay
below: the smaller it is, the fewer passes the search takes; `id_range_of` gives it from shapes alone.

The slots are walked in tiles of `TILE` in a loop up to the (row, head)'s own `count`, which is device data,
so rows and heads may own any number of slots. Callers put a `tl.debug_barrier()` between these reads and
their own writes to the tables, in both directions: other warps of the program may still be reading.
"""

import torch
import triton
import triton.language as tl

from csrc_free_kernels.gpu.counts import count_marked, thresholds

NEVER = tl.constexpr(2**62)


def id_range_of(slot_of: torch.Tensor, block_in: torch.Tensor) -> int:
    """A power of two above every block id (`slot_of` [B, Hkv, N]) and local slot index (`block_in` [L])."""
    return triton.next_power_of_2(max(slot_of.shape[2], block_in.shape[0]))


@triton.jit
def victim_keys(
    block_in, last_used, base, count, step, tail_block, sink_blocks, id_range, i_start, TILE: tl.constexpr
):
    """Keys [TILE] int64 of the local slots `i_start .. i_start + TILE - 1`; `NEVER` from `count` on."""
    o_i = i_start + tl.arange(0, TILE)
    m_i = o_i < count
    b_block = tl.load(block_in + base + o_i, mask=m_i, other=0)
    b_used = tl.load(last_used + base + o_i, mask=m_i, other=0)
    b_stay = (b_block < sink_blocks) | (b_block == tail_block) | (b_used == step)
    b_resident = (b_used.to(tl.int64) + 1) * id_range + b_block.to(tl.int64)
    b_key = tl.where(b_block < 0, o_i.to(tl.int64), tl.where(b_stay, NEVER, b_resident))
    return tl.where(m_i, b_key, NEVER)


@triton.jit
def oldest_slot(
    block_in, last_used, base, count, step, tail_block, sink_blocks, id_range, TILE: tl.constexpr
):
    """The first victim's slot (int64), or -1 when there is no candidate."""
    b_best = tl.full((), NEVER, tl.int64)
    b_slot = tl.full((), -1, tl.int64)
    for i_start in range(0, count, TILE):
        b_key = victim_keys(
            block_in, last_used, base, count, step, tail_block, sink_blocks, id_range, i_start, TILE
        )
        b_min = tl.min(b_key, axis=0)
        # keys are unique, so at most one element survives the mask
        o_slot = (base + i_start + tl.arange(0, TILE)).to(tl.int64)
        b_at = tl.max(tl.where((b_key == b_min) & (b_key < NEVER), o_slot, -1), axis=0)
        b_slot = tl.where(b_min < b_best, b_at, b_slot)
        b_best = tl.minimum(b_min, b_best)
    return b_slot


@triton.jit
def victim_threshold(
    block_in, last_used, base, count, step, tail_block, sink_blocks, id_range, num, TILE: tl.constexpr
):
    """The key up to which a slot is one of the `num` first victims; -1 when `num` is 0 or nothing may go.

    With fewer than `num` candidates every candidate is below it (and `NEVER` still is not). Binary search
    over the key range: one pass over the slots per step, at most log2(range) steps.
    """
    b_low = tl.full((), NEVER, tl.int64)
    b_high = tl.full((), -1, tl.int64)
    b_candidates = tl.full((), 0, tl.int32)
    for i_start in range(0, count, TILE):
        b_key = victim_keys(
            block_in, last_used, base, count, step, tail_block, sink_blocks, id_range, i_start, TILE
        )
        m_key = b_key < NEVER
        b_low = tl.minimum(b_low, tl.min(b_key, axis=0))
        b_high = tl.maximum(b_high, tl.max(tl.where(m_key, b_key, -1), axis=0))
        b_candidates += tl.sum(m_key.to(tl.int32), axis=0)
    # one victim is the smallest key, and all candidates are below the largest: neither needs the search
    b_high = tl.where(num <= 0, -1, tl.where(num == 1, tl.minimum(b_low, b_high), b_high))
    b_low = tl.where((num <= 1) | (num >= b_candidates), b_high, b_low)
    while b_low < b_high:
        b_middle = (b_low + b_high) // 2
        b_below = tl.full((), 0, tl.int32)
        for i_start in range(0, count, TILE):
            b_key = victim_keys(
                block_in, last_used, base, count, step, tail_block, sink_blocks, id_range, i_start, TILE
            )
            b_below += tl.sum((b_key <= b_middle).to(tl.int32), axis=0)
        b_low = tl.where(b_below >= num, b_low, b_middle + 1)
        b_high = tl.where(b_below >= num, b_middle, b_high)
        # exactly `num` keys at or below the middle: any threshold from here to the next key will do
        b_low = tl.where(b_below == num, b_high, b_low)
    return b_high


@triton.jit
def first_victims(b_key, num, TILE: tl.constexpr):
    """Which of the keys [TILE] are the `num` first victims (every candidate if there are fewer), in registers.

    Cuts the key range in parts; ends at the first threshold with exactly `num` keys at or below it.
    """
    m_key = b_key < NEVER
    b_candidates = tl.sum(m_key.to(tl.int32), axis=0)
    b_low = tl.min(b_key, axis=0)
    b_high = tl.max(tl.where(m_key, b_key, -1), axis=0)
    b_high = tl.where(num == 1, tl.minimum(b_low, b_high), b_high)
    b_low = tl.where((num <= 1) | (num >= b_candidates), b_high, b_low)
    while b_low < b_high:
        b_1, b_2, b_3 = thresholds(b_low - 1, b_high, TILE)
        n_1, n_2, n_3 = count_marked(b_key <= b_1, b_key <= b_2, b_key <= b_3, TILE)
        b_past = tl.where(n_2 >= num, b_1, tl.where(n_3 >= num, b_2, b_3)) + 1
        b_low = tl.where(n_1 >= num, b_low, b_past)
        b_high = tl.where(n_1 >= num, b_1, tl.where(n_2 >= num, b_2, tl.where(n_3 >= num, b_3, b_high)))
        m_exact = (n_1 == num) | ((n_1 < num) & ((n_2 == num) | ((n_2 < num) & (n_3 == num))))
        b_low = tl.where(m_exact, b_high, b_low)
    return b_key <= b_high
