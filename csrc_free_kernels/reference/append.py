"""One new token a row: write-through, the tail block's slot, its summary."""

from typing import Literal

from torch import Tensor

from csrc_free_kernels.reference.summarize_chunk import VECTORS, summarize, unit_tokens
from csrc_free_kernels.reference.victims import victims


def append(
    k_new: Tensor,
    v_new: Tensor,
    seq_lens: Tensor,
    host_table: Tensor,
    k_host: Tensor,
    v_host: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slot_of: Tensor,
    block_in: Tensor,
    last_used: Tensor,
    slot_base: Tensor,
    slot_count: Tensor,
    step: Tensor,
    summary: Tensor | None,
    load_count: Tensor,
    *,
    sink_blocks: int,
    summary_kind: Literal["none", "mean", "minmax", "cuboid"],
    value_summary: Tensor | None = None,
    bias_new: Tensor | None = None,
    bias_host: Tensor | None = None,
    bias_pool: Tensor | None = None,
) -> None:
    """Write the token at position `seq_len - 1` of every active row to its host page and to the pool.

    The tail block claims a slot by the victim rule when it has none, and the tokens before this one are then
    copied from the host. A summary entry is computed when this token completes it. Everything is in place.

    Args:
        k_new: [B, Hkv, D], any float dtype.
        v_new: [B, Hkv, D].
        seq_lens: int32 [B], tokens, the new one included; 0 = inactive.
        host_table: int32 [B, N]; the tail block of an active row has a page.
        k_host: [P, Hkv, C, D], host memory.
        v_host: [P, Hkv, C, D], host memory.
        k_pool: [L, C, D].
        v_pool: [L, C, D].
        slot_of: int32 [B, Hkv, N].
        block_in: int32 [L].
        last_used: int32 [L].
        slot_base: int32 [B, Hkv].
        slot_count: int32 [B, Hkv].
        step: int32 [1].
        summary: [P, Hkv, W, D], or None for kind `none`. Only the completed entries are written.
        load_count: int32 [1], set to 0.
        sink_blocks: blocks below this number are never evicted.
        summary_kind: what `summary` holds.
        value_summary: [P, Hkv, W, D] means of the values of every sub-unit of C / W tokens, or None for none.
        bias_new: [B, Hkv], a bias per token that is kept beside K and V; None with the next two where there is none.
        bias_host: [P, Hkv, C], host memory.
        bias_pool: [L, C].
    """
    load_count.zero_()
    kept = [(k_new, k_host, k_pool), (v_new, v_host, v_pool)]
    if bias_new is not None:
        assert bias_host is not None and bias_pool is not None
        kept.append((bias_new, bias_host, bias_pool))
    block_size, this_step = k_pool.shape[1], int(step[0])
    for b, seq_len in enumerate(seq_lens.tolist()):
        if seq_len <= 0:
            continue
        block, offset = divmod(seq_len - 1, block_size)
        page = int(host_table[b, block])
        for new, host, _ in kept:
            host[page, :, offset] = new[b]
        for h in range(k_new.shape[1]):
            slot = int(slot_of[b, h, block])
            if slot < 0:
                own = int(slot_base[b, h]), int(slot_count[b, h])
                first = victims(block_in, last_used, *own, this_step, block, sink_blocks, 1)
                if len(first) == 0:
                    continue
                slot = int(first[0])
                _claim(slot_of[b, h], block_in, slot, block)
                for _, host, pool in kept:
                    pool[slot, :offset] = host[page, h, :offset]
            for new, _, pool in kept:
                pool[slot, offset] = new[b, h]
            last_used[slot] = this_step
            if summary is not None and summary_kind != "none":
                _summarize_tail(summary[page, h], k_pool[slot], offset, summary_kind)
            if value_summary is not None:
                _summarize_tail(value_summary[page, h], v_pool[slot], offset, "mean")


def _claim(slot_of: Tensor, block_in: Tensor, slot: int, block: int) -> None:
    old = int(block_in[slot])
    if old >= 0:
        slot_of[old] = -1
    slot_of[block], block_in[slot] = slot, block


def _summarize_tail(summary: Tensor, keys: Tensor, offset: int, kind: str) -> None:
    """Write what the token at `offset` completes: keys or values [C, D] of one block -> summary [W, D]."""
    unit = unit_tokens(kind, len(keys), len(summary))
    if (offset + 1) % unit == 0:
        entry = summarize(keys[offset + 1 - unit : offset + 1], kind).to(summary.dtype)
        summary.unflatten(0, (-1, VECTORS[kind]))[offset // unit] = entry
