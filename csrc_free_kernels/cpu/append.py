"""One new token a row: write-through, the tail block's slot, its summary."""

from typing import Literal

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import FASTMATH, as_numpy, code_of
from csrc_free_kernels.cpu.summarize_chunk import (
    CUBOID,
    KINDS,
    MEAN,
    NONE,
    finish_cuboid,
    fold_key,
    fold_radius,
    start_radius,
    store_summary,
)
from csrc_free_kernels.cpu.victims import oldest_slot

NO_SUMMARY = np.zeros((0, 0, 0, 0), np.float32)  # what an absent tensor is passed as


def no_bias(like: np.ndarray) -> tuple[np.ndarray, ...]:
    """What an absent bias (new, host, pool) is passed as, beside keys of that kind."""
    return tuple(np.zeros((0,) * dims, like.dtype) for dims in (2, 3, 2))


@nb.njit(cache=True)
def copy_rows(src, dst, begin, end):
    """Copy rows `begin .. end - 1` of [C, D]."""
    for t in range(begin, end):
        for d in range(src.shape[1]):
            dst[t, d] = src[t, d]


@nb.njit(cache=True, fastmath=FASTMATH)
def summarize_tail(keys, summary, offset, code, summary_code, kind):
    """Write what the token at `offset` completes: keys [C, D] of one block -> summary [W, D]."""
    unit = keys.shape[0] * (1 if kind == MEAN else 2) // summary.shape[0]
    if (offset + 1) % unit == 0:
        high, low = np.empty(keys.shape[1], np.float32), np.empty(keys.shape[1], np.float32)
        for t in range(unit):
            fold_key(keys[offset + 1 - unit + t], t == 0, high, low, code, kind)
        if kind == CUBOID:
            start_radius(high, low)
            for t in range(unit):
                fold_radius(keys[offset + 1 - unit + t], high, low, code)
            finish_cuboid(high, low, unit)
        store_summary(summary, offset // unit, high, low, unit, summary_code, kind)


# Serial: a (row, head) moves about a kilobyte, less than it costs to wake a thread.
@nb.njit(cache=True, fastmath=FASTMATH)
def append_kernel(
    k_new, v_new, seq_lens, host_table, k_host, v_host, k_pool, v_pool, slot_of, block_in, last_used,
    slot_base, slot_count, step, summary, value_summary, load_count, sink_blocks, code, summary_code, kind,
    bias_new, bias_host, bias_pool,
):  # fmt: skip
    num_rows, num_kv_heads, head_dim = k_new.shape
    block_size = k_pool.shape[1]
    has_bias = bias_new.size > 0
    load_count[0] = 0
    for i in range(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        if seq_lens[b] <= 0:
            continue
        block, offset = (seq_lens[b] - 1) // block_size, (seq_lens[b] - 1) % block_size
        page = host_table[b, block]
        for d in range(head_dim):
            k_host[page, h, offset, d] = k_new[b, h, d]
            v_host[page, h, offset, d] = v_new[b, h, d]
        if has_bias:
            bias_host[page, h, offset] = bias_new[b, h]
        slot = np.int64(slot_of[b, h, block])
        if slot < 0:
            slot = oldest_slot(
                block_in, last_used, slot_base[b, h], slot_count[b, h], step[0], block, sink_blocks
            )
            if slot < 0:
                continue
            if block_in[slot] >= 0:
                slot_of[b, h, block_in[slot]] = -1
            slot_of[b, h, block], block_in[slot] = slot, block
            copy_rows(k_host[page, h], k_pool[slot], 0, offset)
            copy_rows(v_host[page, h], v_pool[slot], 0, offset)
            if has_bias:
                bias_pool[slot, :offset] = bias_host[page, h, :offset]
        for d in range(head_dim):
            k_pool[slot, offset, d] = k_new[b, h, d]
            v_pool[slot, offset, d] = v_new[b, h, d]
        if has_bias:
            bias_pool[slot, offset] = bias_new[b, h]
        last_used[slot] = step[0]
        if kind != NONE:
            summarize_tail(k_pool[slot], summary[page, h], offset, code, summary_code, kind)
        if value_summary.size > 0:
            summarize_tail(v_pool[slot], value_summary[page, h], offset, code, code, MEAN)


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

    Args:
        k_new: [B, Hkv, D], fp32, bf16 or fp16.
        v_new: [B, Hkv, D].
        seq_lens: int32 [B], tokens, the new one included; 0 = inactive.
        host_table: int32 [B, N]; the tail block of an active row has a page.
        k_host: [P, Hkv, C, D], like all caches of the dtype of `k_new`.
        v_host: [P, Hkv, C, D].
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
        bias_host: [P, Hkv, C].
        bias_pool: [L, C].
    """
    code = code_of(k_new)
    bias = no_bias(as_numpy(k_new))
    if bias_new is not None:
        assert bias_host is not None and bias_pool is not None
        bias = as_numpy(bias_new), as_numpy(bias_host), as_numpy(bias_pool)
    append_kernel(
        as_numpy(k_new),
        as_numpy(v_new),
        seq_lens.numpy(),
        host_table.numpy(),
        as_numpy(k_host),
        as_numpy(v_host),
        as_numpy(k_pool),
        as_numpy(v_pool),
        slot_of.numpy(),
        block_in.numpy(),
        last_used.numpy(),
        slot_base.numpy(),
        slot_count.numpy(),
        step.numpy(),
        NO_SUMMARY if summary is None else as_numpy(summary),
        NO_SUMMARY if value_summary is None else as_numpy(value_summary),
        load_count.numpy(),
        sink_blocks,
        code,
        code if summary is None else code_of(summary),
        KINDS[summary_kind],
        *bias,
    )
