"""Truth of `resolve`: selection meets residency."""

from torch import Tensor

from csrc_free_kernels.reference.victims import victims


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

    Misses in ascending order take the victims in ascending order. Should there be fewer victims than misses,
    the last misses stay absent (`miss_slots` -1, not in the load list).

    Args:
        selected_blocks, num_selected: int32 [B, Hkv, S] ascending, [B, Hkv].
        seq_lens: int32 [B], tokens; 0 = inactive.
        host_table: int32 [B, N], logical block -> host page.
        slot_of, block_in, last_used: int32 [B, Hkv, N], [L], [L], updated in place.
        slot_base, slot_count: int32 [B, Hkv].
        step: int32 [1].
        hit_slots, miss_slots: int32 [B, Hkv, S], written in full: the slot of a hit / of a load, else -1.
        load_src, load_dst, load_at: int32 [max_loads], the load list: page * Hkv + head, slot, and whose it is:
            (b * Hkv + h) * S + rank among the loads of the (row, head), which stand side by side, ascending by
            block. Filled from `load_count` on.
        load_count: int32 [1], grows by the number of loads.
        counters: int64 [B, Hkv, 5], grow by selected, hits, forced, forced hits (these without the tail) and
            evictions.
        block_size: tokens in a block.
        sink_blocks, recent_blocks: blocks forced at the start and at the end.
    """
    num_rows, num_kv_heads, width = selected_blocks.shape
    hit_slots.fill_(-1)
    miss_slots.fill_(-1)
    now = int(step)
    for b, seq_len in enumerate(seq_lens.tolist()):
        if seq_len == 0:
            continue
        tail = (seq_len - 1) // block_size
        for h in range(num_kv_heads):
            blocks = selected_blocks[b, h, : int(num_selected[b, h])].tolist()
            slots = slot_of[b, h].tolist()
            base, count = int(slot_base[b, h]), int(slot_count[b, h])
            for s, block in enumerate(blocks):
                if slots[block] >= 0:
                    hit_slots[b, h, s] = slots[block]
                    last_used[slots[block]] = now
            missing = [s for s, block in enumerate(blocks) if slots[block] < 0]
            free = victims(block_in, last_used, base, count, now, tail, sink_blocks, len(missing)).tolist()
            for rank, (s, slot) in enumerate(zip(missing, free, strict=False)):
                old, block = int(block_in[slot]), blocks[s]
                if old >= 0:
                    slot_of[b, h, old] = -1
                    counters[b, h, 4] += 1
                slot_of[b, h, block], block_in[slot], last_used[slot] = slot, block, now
                miss_slots[b, h, s] = slot
                place = int(load_count)
                load_src[place], load_dst[place] = int(host_table[b, block]) * num_kv_heads + h, slot
                load_at[place] = (b * num_kv_heads + h) * width + rank
                load_count += 1
            closed = [block for block in blocks if block != tail]
            forced = [block for block in closed if block < sink_blocks or block > tail - recent_blocks]
            counters[b, h, 0] += len(closed)
            counters[b, h, 1] += sum(slots[block] >= 0 for block in closed)
            counters[b, h, 2] += len(forced)
            counters[b, h, 3] += sum(slots[block] >= 0 for block in forced)
