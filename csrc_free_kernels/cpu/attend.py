"""Partial attention of one decode step over selected KV blocks, read in place from the pool."""

import math

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import BF16, FASTMATH, FP16, _bits_to_float, as_numpy, code_of, decode

LOG2E = np.float32(math.log2(math.e))


@nb.njit(inline="always")
def exp_negative(x):
    """exp(x) for x <= 0 or -inf, to fp32 accuracy; unlike math.exp, LLVM vectorises it."""
    y = max(x * LOG2E, np.float32(-127))  # 2^-127 becomes 0
    n = np.int32(y - np.float32(0.5))
    f = (y - np.float32(n)) * np.float32(0.6931471805599453)
    p = np.float32(1 / 5040)
    p = p * f + np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * _bits_to_float(np.uint32((n + np.int32(127)) << np.int32(23)))


@nb.njit(cache=True, fastmath=FASTMATH)
def load_rows(pool, start, count, rows, code):
    """Decode tokens into rows [4, D] from element `start` of the flat pool; those from `count` on become 0."""
    head_dim = rows.shape[1]
    for i in range(4):
        row = pool[start + i * head_dim : start + (i + 1) * head_dim]
        if i >= count:
            rows[i, :] = 0
        elif code == FP16:  # with the code spelt out, every loop vectorises
            for d in range(head_dim):
                rows[i, d] = decode(row[d], FP16)
        elif code == BF16:
            for d in range(head_dim):
                rows[i, d] = decode(row[d], BF16)
        else:
            for d in range(head_dim):
                rows[i, d] = row[d]


def flat(pool: Tensor) -> tuple[np.ndarray, int]:
    """View a pool [L, C, D] as one run of elements, and the elements from slot to slot.

    numba reads a strided array element by element; only what it knows to be contiguous is vectorised.
    """
    slots, block_size, head_dim = pool.shape
    stride = pool.stride(0)
    return as_numpy(pool.as_strided(((slots - 1) * stride + block_size * head_dim,), (1,))), stride


# Tokens go by four in the next two, so that each element of q or out is loaded once for four.


@nb.njit(cache=True, fastmath=FASTMATH)
def block_logits(pool, start, lo, hi, q, rows, x, code):
    """x[g, c] = q[g] . key c for tokens [lo, hi) of the block at `start`; up to three more are written."""
    for c in range(lo, hi, 4):
        load_rows(pool, start + c * q.shape[1], hi - c, rows, code)
        for g in range(q.shape[0]):
            x0, x1, x2, x3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(q.shape[1]):
                x0 += q[g, d] * rows[0, d]
                x1 += q[g, d] * rows[1, d]
                x2 += q[g, d] * rows[2, d]
                x3 += q[g, d] * rows[3, d]
            x[g, c], x[g, c + 1], x[g, c + 2], x[g, c + 3] = x0, x1, x2, x3


@nb.njit(cache=True, fastmath=FASTMATH)
def add_values(pool, start, lo, hi, weights, rows, acc, code):
    """acc[g] += weights[g, c] * value c over the tokens [lo, hi)."""
    for c in range(lo, hi, 4):
        load_rows(pool, start + c * acc.shape[1], hi - c, rows, code)
        for g in range(acc.shape[0]):
            w0, w1, w2, w3 = weights[g, c], weights[g, c + 1], weights[g, c + 2], weights[g, c + 3]
            for d in range(acc.shape[1]):
                acc[g, d] += (w0 * rows[0, d] + w1 * rows[1, d]) + (w2 * rows[2, d] + w3 * rows[3, d])


@nb.njit(cache=True, fastmath=FASTMATH)
def online_softmax(x, lo, hi, top, total, acc, soft_cap, bias):
    """Turn a block's logits into weights relative to the maximum so far, and rescale what came before.

    bias [C], or of no elements: added to the logits.
    """
    for g in range(x.shape[0]):
        row = x[g, lo:hi]
        new = top[g]
        for c in range(row.size):
            if soft_cap > 0:
                row[c] = soft_cap * np.float32(math.tanh(row[c] / soft_cap))
            if bias.size > 0:
                row[c] += bias[lo + c]
            new = max(new, row[c])
        part = np.float32(0)
        for c in range(row.size):
            row[c] = exp_negative(row[c] - new)
            part += row[c]
        decay = np.float32(math.exp(top[g] - new))
        for d in range(acc.shape[1]):
            acc[g, d] *= decay
        total[g], top[g] = total[g] * decay + part, new


# One iteration: one split of one (row, KV head). q [B, Hq, D]; k_pool, v_pool flat, *_stride elements a slot;
# block_ids, block_slots [B, Hkv, S]; out [T, B, Hq, D]; lse [T, B, Hq]; bias_pool [L, C], or of no elements.
@nb.njit(cache=True, parallel=True, fastmath=FASTMATH)
def attend_kernel(
    q, k_pool, k_stride, v_pool, v_stride, code, block_ids, block_slots, seq_lens, out, lse,
    C, scale, soft_cap, window, bias_pool, bias_scale,
):  # fmt: skip
    num_splits, batch, num_q_heads, head_dim = out.shape
    num_kv_heads, num_ids = block_ids.shape[1], block_ids.shape[2]
    G = num_q_heads // num_kv_heads
    for i in nb.prange(num_splits * batch * num_kv_heads):
        t, b, h = i // (batch * num_kv_heads), i // num_kv_heads % batch, i % num_kv_heads
        scaled_q, acc = np.empty((G, head_dim), np.float32), np.zeros((G, head_dim), np.float32)
        rows, x = np.empty((4, head_dim), np.float32), np.zeros((G, C + 3), np.float32)
        bias = np.empty(bias_pool.shape[1], np.float32)
        top, total = np.full(G, -np.inf, np.float32), np.zeros(G, np.float32)
        for g in range(G):
            for d in range(head_dim):
                scaled_q[g, d] = decode(q[b, h * G + g, d], code) * scale
        for s in range(t, num_ids, num_splits):
            slot, first = np.int64(block_slots[b, h, s]), np.int64(block_ids[b, h, s]) * C
            lo, hi = max(0, seq_lens[b] - window - first), min(C, seq_lens[b] - first)
            if slot >= 0 and lo < hi:
                block_logits(k_pool, slot * k_stride, lo, hi, scaled_q, rows, x, code)
                for c in range(lo, min(hi, bias.size)):
                    bias[c] = decode(bias_pool[slot, c], code) * bias_scale
                online_softmax(x, lo, hi, top, total, acc, soft_cap, bias)
                add_values(v_pool, slot * v_stride, lo, hi, x, rows, acc, code)
        for g in range(G):
            inverse = np.float32(1) / total[g] if total[g] != 0 else np.float32(0)
            for d in range(head_dim):
                out[t, b, h * G + g, d] = acc[g, d] * inverse
            lse[t, b, h * G + g] = top[g] + math.log(total[g]) if total[g] != 0 else -np.inf


def attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_ids: Tensor,
    block_slots: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
    bias_pool: Tensor | None = None,
    bias_scale: float = 1.0,
) -> None:
    """Attend to the blocks of each (row, KV head) that have a slot, in T splits that merge later.

    Splits and (row, KV head) pairs run in parallel: T * B * Hkv should be at least the number of threads.

    Args:
        q: [B, Hq, D], fp32, bf16 or fp16.
        k_pool: [L, C, D], token stride D, the dtype of q. Slots that are not named may hold anything.
        v_pool: [L, C, D], token stride D.
        block_ids: int32 [B, Hkv, S], logical block ids, which fix the token positions.
        block_slots: int32 [B, Hkv, S], -1 = leave this entry out.
        seq_lens: int32 [B], tokens; 0 = the row has no keys.
        out: fp32 [T, B, Hq, D]; split t takes the entries s with s % T == t. Every element is written.
        lse: fp32 [T, B, Hq], natural log; a split without keys gets out 0 and lse -inf.
        softmax_scale: factor on q.k.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap).
        window: None, or only the last `window` tokens count.
        bias_pool: [L, C] or None: a number per token; `bias_scale` times it is added to the (capped) logit.
        bias_scale: factor on the bias.
    """
    bits = as_numpy(q)
    attend_kernel(
        bits, *flat(k_pool), *flat(v_pool), code_of(q), block_ids.numpy(), block_slots.numpy(),
        seq_lens.numpy(), out.numpy(), lse.numpy(), k_pool.shape[1],
        np.float32(softmax_scale), np.float32(soft_cap or 0), 2**31 - 1 if window is None else window,
        np.zeros((0, 0), bits.dtype) if bias_pool is None else as_numpy(bias_pool), np.float32(bias_scale),
    )  # fmt: skip
