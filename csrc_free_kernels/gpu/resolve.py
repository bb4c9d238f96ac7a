"""Triton `resolve`: hits, misses, victims, tables and the load list of a step."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.victims import first_victims, id_range_of, victim_keys, victim_threshold

MAX_TILE = 512  # slots looked at together; a (row, head) that owns more is walked in several tiles
SLOTS_PER_WARP = 256  # 8 a thread: a usual capacity needs one warp, whose reductions wait for nobody


# Hits, misses, tables, load list and counters of one (row, head), for the first `num` of the selected blocks
# b_block [S_P], whose slots, or -1, are b_slot; i_row = b * Hkv + h. Pointers are the (row, head)'s own but
# `block_in`, `last_used` and the load list.
@triton.jit
def resolve_blocks(
    b_block, b_slot, num, nb, i_step, i_row, p_table, p_slot_of, block_in, last_used, p_base, p_count,
    p_hits, p_misses, load_src, load_dst, load_at, load_count, p_counters, sink_blocks, recent_blocks, id_range,
    Hkv, S: tl.constexpr, S_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    o_s = tl.arange(0, S_P)
    m_block = o_s < num
    b_slot = tl.where(m_block, b_slot, -1)
    m_hit = m_block & (b_slot >= 0)
    m_miss = m_block & (b_slot < 0)
    tail_slot = tl.load(p_slot_of + nb - 1, mask=nb > 0, other=0)
    tl.store(p_hits + o_s, b_slot, mask=o_s < S)
    tl.store(last_used + b_slot, tl.full([S_P], 0, tl.int32) + i_step, mask=m_hit)

    # selected, hits, forced, forced hits: four counts in one reduction, of a 32-bit word where that holds them
    BITS: tl.constexpr = 8 if S_P <= 128 else 16
    FIELD: tl.constexpr = 2**BITS - 1
    WORD: tl.constexpr = tl.int32 if S_P <= 128 else tl.int64
    m_counted = m_block & (b_block < nb - 1)
    m_forced = m_counted & ((b_block < sink_blocks) | (b_block >= nb - recent_blocks))
    b_word = m_counted.to(WORD) + (m_forced.to(WORD) << 2 * BITS)
    b_word = tl.sum(tl.where(m_hit, b_word * (1 + 2**BITS), b_word), axis=0)
    num_counted, num_hits = (b_word & FIELD).to(tl.int32), (b_word >> BITS & FIELD).to(tl.int32)
    tail_missing = (num > num_counted) & (tail_slot < 0)  # the one block that is not counted
    num_misses = num_counted - num_hits + tail_missing.to(tl.int32)

    b_evicted = tl.full((), 0, tl.int32)
    b_new = tl.full([S_P], -1, tl.int32)
    if num_misses > 0:
        base, count = tl.load(p_base), tl.load(p_count)
        tl.debug_barrier()  # the hits just stamped are no candidates, whichever warp reads them
        i_list, num_victims, b_evicted = take_victims(
            p_slot_of, block_in, last_used, base, count, i_step, nb - 1, num_misses, load_dst, load_count,
            sink_blocks, id_range, TILE,
        )  # fmt: skip
        # misses meet victims in the load list: the r-th miss writes its page, the r-th victim its slot
        b_rank = tl.cumsum(m_miss.to(tl.int32), axis=0) - 1
        m_loaded = m_miss & (b_rank < num_victims)
        b_page = tl.load(p_table + b_block, mask=m_loaded, other=0)
        tl.store(load_src + i_list + b_rank, b_page * Hkv + (i_row % Hkv).to(tl.int32), mask=m_loaded)
        tl.store(load_at + i_list + b_rank, (i_row * S).to(tl.int32) + b_rank, mask=m_loaded)
        tl.debug_barrier()
        b_new = tl.load(load_dst + i_list + b_rank, mask=m_loaded, other=-1)
        tl.store(p_slot_of + b_block, b_new, mask=m_loaded)
        tl.store(block_in + b_new, b_block, mask=m_loaded)
        tl.store(last_used + b_new, tl.full([S_P], 0, tl.int32) + i_step, mask=m_loaded)
    tl.store(p_misses + o_s, b_new, mask=o_s < S)

    # nobody else touches these counters; an atomic whose result is not used need not wait for the old value
    o_c = tl.arange(0, 8)
    b_count = (b_word >> (BITS * tl.minimum(o_c, 3))) & FIELD
    b_amount = tl.where(o_c < 4, b_count, b_evicted).to(tl.int64)
    tl.atomic_add(p_counters + o_c, b_amount, mask=o_c < 5, sem="relaxed")


# Writes the first `num` victims' slots into the load list, ascending, and takes their blocks out of `slot_of`.
# Returns where in the list, how many, and how many of them held a block.
@triton.jit
def take_victims(
    p_slot_of, block_in, last_used, base, count, step, tail_block, num, load_dst, load_count, sink_blocks,
    id_range, TILE: tl.constexpr,
):  # fmt: skip
    rule = (step, tail_block, sink_blocks, id_range)
    # the order of (row, head) pairs in the list carries no meaning, so a relaxed atomic is enough
    if count <= TILE:
        b_key = victim_keys(block_in, last_used, base, count, *rule, 0, TILE)
        m_victim = first_victims(b_key, num, TILE)
        num_victims = tl.sum(m_victim.to(tl.int32), axis=0)
        i_list = tl.atomic_add(load_count, num_victims, sem="relaxed")
        b_evicted = list_victims(p_slot_of, block_in, base, m_victim, load_dst + i_list, TILE)
    else:
        threshold = victim_threshold(block_in, last_used, base, count, *rule, num, TILE)
        num_victims = tl.full((), 0, tl.int32)
        for i_start in range(0, count, TILE):
            b_key = victim_keys(block_in, last_used, base, count, *rule, i_start, TILE)
            num_victims += tl.sum((b_key <= threshold).to(tl.int32), axis=0)
        i_list = tl.atomic_add(load_count, num_victims, sem="relaxed")
        b_evicted = tl.full((), 0, tl.int32)
        num_before = tl.full((), 0, tl.int32)
        for i_start in range(0, count, TILE):
            b_key = victim_keys(block_in, last_used, base, count, *rule, i_start, TILE)
            m_victim = b_key <= threshold
            p_list = load_dst + i_list + num_before
            b_evicted += list_victims(p_slot_of, block_in, base + i_start, m_victim, p_list, TILE)
            num_before += tl.sum(m_victim.to(tl.int32), axis=0)
    return i_list, num_victims, b_evicted


# One tile of slots from `first` on: the marked ones go to `p_list`, their blocks become absent.
@triton.jit
def list_victims(p_slot_of, block_in, first, m_victim, p_list, TILE: tl.constexpr):
    o_slot = first + tl.arange(0, TILE)
    b_place = tl.cumsum(m_victim.to(tl.int32), axis=0) - 1
    tl.store(p_list + b_place, o_slot, mask=m_victim)
    b_old = tl.load(block_in + o_slot, mask=m_victim, other=-1)
    tl.store(p_slot_of + b_old, tl.full([TILE], -1, tl.int32), mask=b_old >= 0)
    return tl.sum((b_old >= 0).to(tl.int32), axis=0)


# Grid (B * Hkv), one (row, head) a program. selected_blocks, hit_slots, miss_slots int32 [B, Hkv, S]; slot_of
# int32 [B, Hkv, N]; host_table int32 [B, N]; load_src, load_dst, load_at int32 [max_loads]; counters int64
# [B, Hkv, 5].
@triton.jit
def resolve_kernel(
    selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base, slot_count,
    step, hit_slots, miss_slots, load_src, load_dst, load_at, load_count, counters,
    block_size, sink_blocks, recent_blocks, id_range, Hkv, stride_tb, stride_sb, stride_sh,
    S: tl.constexpr, S_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = (tl.program_id(0) // Hkv).to(tl.int64), (tl.program_id(0) % Hkv).to(tl.int64)
    nb = (tl.load(seq_lens + i_b) + block_size - 1) // block_size
    num = tl.where(nb > 0, tl.load(num_selected + i_row), 0)
    i_step = tl.load(step)
    o_s = tl.arange(0, S_P)
    p_slot_of = slot_of + i_b * stride_sb + i_h * stride_sh
    b_block = tl.load(selected_blocks + i_row * S + o_s, mask=o_s < num, other=0)
    b_slot = tl.load(p_slot_of + b_block, mask=o_s < num, other=-1)
    resolve_blocks(
        b_block, b_slot, num, nb, i_step, i_row, host_table + i_b * stride_tb, p_slot_of, block_in, last_used,
        slot_base + i_row, slot_count + i_row,
        hit_slots + i_row * S, miss_slots + i_row * S, load_src, load_dst, load_at, load_count,
        counters + i_row * 5, sink_blocks, recent_blocks, id_range, Hkv, S, S_P, TILE,
    )  # fmt: skip


def tile_of_slots(block_in: Tensor, heads: int) -> int:
    """Slots that a program looks at together, for `heads` (row, head) pairs: a power of two."""
    return min(max(triton.next_power_of_2(triton.cdiv(block_in.shape[0], heads)), 64), MAX_TILE)


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

    Arguments as in `csrc_free_kernels/reference/resolve.py`. `slot_of` and `host_table` may be strided in all
    but the last dim, all others are contiguous. One launch on the current stream, no wait.

    Raises:
        ValueError: a strided tensor.
    """
    whole = (selected_blocks, num_selected, slot_base, slot_count, hit_slots, miss_slots, counters)
    if not all(t.is_contiguous() for t in whole) or slot_of.stride(2) != 1 or host_table.stride(1) != 1:
        raise ValueError("only slot_of and host_table may be strided, and not in the last dim")
    num_rows, num_kv_heads, width = selected_blocks.shape
    tile = tile_of_slots(block_in, num_rows * num_kv_heads)
    resolve_kernel[(num_rows * num_kv_heads,)](
        selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base,
        slot_count, step, hit_slots, miss_slots, load_src, load_dst, load_at, load_count, counters,
        block_size, sink_blocks, recent_blocks, id_range_of(slot_of, block_in), num_kv_heads,
        host_table.stride(0), slot_of.stride(0), slot_of.stride(1),
        S=width, S_P=triton.next_power_of_2(width), TILE=tile, num_warps=max(1, tile // SLOTS_PER_WARP),
    )  # fmt: skip
