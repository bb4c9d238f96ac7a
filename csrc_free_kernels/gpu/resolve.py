"""Triton `resolve`: hits, misses, victims, tables and the load list of a step."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.victims import id_range_of, victim_keys, victim_threshold

MAX_TILE = 1024  # slots looked at together; a (row, head) that owns more is walked in several tiles
SLOTS_PER_WARP = 256  # 8 a thread: a usual capacity needs one warp, whose reductions wait for nobody


# Grid (B * Hkv), one (row, head) a program. selected_blocks, hit_slots, miss_slots int32 [B, Hkv, S]; slot_of
# int32 [B, Hkv, N]; host_table int32 [B, N]; load_src, load_dst int32 [max_loads]; counters int64
# [B, Hkv, 5].
@triton.jit
def resolve_kernel(
    selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base, slot_count,
    step, hit_slots, miss_slots, load_src, load_dst, load_count, counters,
    block_size, sink_blocks, recent_blocks, id_range, Hkv, stride_tb, stride_sb, stride_sh,
    S: tl.constexpr, S_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_b = i_row // Hkv
    i_h = i_row % Hkv
    i_step = tl.load(step)
    nb = (tl.load(seq_lens + i_b) + block_size - 1) // block_size
    o_s = tl.arange(0, S_P)
    m_s = (o_s < tl.load(num_selected + i_row)) & (nb > 0)
    b_block = tl.load(selected_blocks + i_row * S + o_s, mask=m_s, other=0)
    p_slot_of = slot_of + i_b * stride_sb + i_h * stride_sh
    b_slot = tl.load(p_slot_of + b_block, mask=m_s, other=-1)
    m_hit = m_s & (b_slot >= 0)
    m_miss = m_s & (b_slot < 0)
    tl.store(hit_slots + i_row * S + o_s, b_slot, mask=o_s < S)
    tl.store(last_used + b_slot, tl.full([S_P], 0, tl.int32) + i_step, mask=m_hit)

    m_counted = m_s & (b_block < nb - 1)
    m_forced = m_counted & ((b_block < sink_blocks) | (b_block >= nb - recent_blocks))
    b_evicted = tl.full((), 0, tl.int32)
    b_new = tl.full([S_P], -1, tl.int32)
    num_misses = tl.sum(m_miss.to(tl.int32), axis=0)
    if num_misses > 0:
        base = tl.load(slot_base + i_row)
        count = tl.load(slot_count + i_row)
        # the hits just stamped are no candidates, whichever warp reads them
        tl.debug_barrier()
        threshold = victim_threshold(
            block_in, last_used, base, count, i_step, nb - 1, sink_blocks, id_range, num_misses, TILE
        )
        num_victims = tl.full((), 0, tl.int32)
        for i_start in range(0, count, TILE):
            b_key = victim_keys(
                block_in, last_used, base, count, i_step, nb - 1, sink_blocks, id_range, i_start, TILE
            )
            num_victims += tl.sum((b_key <= threshold).to(tl.int32), axis=0)
        # the order of (row, head) pairs in the list carries no meaning, so a relaxed atomic is enough
        i_list = tl.atomic_add(load_count, num_victims, sem="relaxed")

        # misses meet victims in the load list: the r-th miss writes its page, the r-th victim its slot
        b_rank = tl.cumsum(m_miss.to(tl.int32), axis=0) - 1
        m_loaded = m_miss & (b_rank < num_victims)
        b_page = tl.load(host_table + i_b * stride_tb + b_block, mask=m_loaded, other=0)
        tl.store(load_src + i_list + b_rank, b_page * Hkv + i_h.to(tl.int32), mask=m_loaded)
        num_before = tl.full((), 0, tl.int32)
        for i_start in range(0, count, TILE):
            b_key = victim_keys(
                block_in, last_used, base, count, i_step, nb - 1, sink_blocks, id_range, i_start, TILE
            )
            m_victim = b_key <= threshold
            o_slot = base + i_start + tl.arange(0, TILE)
            b_place = num_before + tl.cumsum(m_victim.to(tl.int32), axis=0) - 1
            tl.store(load_dst + i_list + b_place, o_slot, mask=m_victim)
            b_old = tl.load(block_in + o_slot, mask=m_victim, other=-1)
            tl.store(p_slot_of + b_old, tl.full([TILE], -1, tl.int32), mask=b_old >= 0)
            num_before += tl.sum(m_victim.to(tl.int32), axis=0)
            b_evicted += tl.sum((b_old >= 0).to(tl.int32), axis=0)
        tl.debug_barrier()
        b_new = tl.load(load_dst + i_list + b_rank, mask=m_loaded, other=-1)
        tl.store(p_slot_of + b_block, b_new, mask=m_loaded)
        tl.store(block_in + b_new, b_block, mask=m_loaded)
        tl.store(last_used + b_new, tl.full([S_P], 0, tl.int32) + i_step, mask=m_loaded)
    tl.store(miss_slots + i_row * S + o_s, b_new, mask=o_s < S)

    p_counters = counters + i_row * 5
    add_to(p_counters, tl.sum(m_counted.to(tl.int32), axis=0))
    add_to(p_counters + 1, tl.sum((m_counted & m_hit).to(tl.int32), axis=0))
    add_to(p_counters + 2, tl.sum(m_forced.to(tl.int32), axis=0))
    add_to(p_counters + 3, tl.sum((m_forced & m_hit).to(tl.int32), axis=0))
    add_to(p_counters + 4, b_evicted)


# Only this program touches the counter, so no atomic is needed.
@triton.jit
def add_to(p_counter, b_amount):
    tl.store(p_counter, tl.load(p_counter) + b_amount)


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
    fair_share = triton.next_power_of_2(block_in.shape[0] // (num_rows * num_kv_heads))
    tile = min(max(fair_share, 64), MAX_TILE)
    resolve_kernel[(num_rows * num_kv_heads,)](
        selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base,
        slot_count, step, hit_slots, miss_slots, load_src, load_dst, load_count, counters,
        block_size, sink_blocks, recent_blocks, id_range_of(slot_of, block_in), num_kv_heads,
        host_table.stride(0), slot_of.stride(0), slot_of.stride(1),
        S=width, S_P=triton.next_power_of_2(width), TILE=tile, num_warps=max(1, tile // SLOTS_PER_WARP),
    )  # fmt: skip
