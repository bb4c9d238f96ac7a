"""numba `attend_centroids`: estimated attention over the closed blocks that a step did not select."""

import math

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import FASTMATH, as_numpy, code_of, decode


@nb.njit(cache=True, fastmath=FASTMATH)
def decode_row(row, out, code):
    """out[d] = row[d] as fp32."""
    for d in range(out.size):
        out[d] = decode(row[d], code)


@nb.njit(cache=True)
def unselected(selected, closed, first, step, out):
    """Collect the blocks first, first + step, ... below `closed` that are not selected; returns how many."""
    found, s = 0, 0
    for n in range(first, closed, step):
        while s < selected.size and 0 <= selected[s] < n:
            s += 1
        if s == selected.size or selected[s] != n:
            out[found] = n
            found += 1
    return found


# One iteration: one split of one (row, KV head). mean_k, mean_v [P, Hkv, W, D]; out [T, B, Hq, D]; lse [T, B, Hq].
@nb.njit(cache=True, parallel=True, fastmath=FASTMATH)
def attend_centroids_kernel(
    q, mean_k, mean_v, host_table, seq_lens, selected, out, lse, block_size, scale, soft_cap, code, mean_code
):
    num_splits, batch, num_q_heads, head_dim = out.shape
    num_kv_heads, units = mean_k.shape[1], mean_k.shape[2]
    G = num_q_heads // num_kv_heads
    log_count = np.float32(math.log(block_size // units))
    for i in nb.prange(num_splits * batch * num_kv_heads):
        t, b, h = i // (batch * num_kv_heads), i // num_kv_heads % batch, i % num_kv_heads
        closed = min(seq_lens[b] // block_size, host_table.shape[1])
        blocks = np.empty(max(closed, 1), np.int64)
        found = unselected(selected[b, h], closed, t, num_splits, blocks)
        scaled_q, row = np.empty((G, head_dim), np.float32), np.empty(head_dim, np.float32)
        x = np.empty((G, max(found * units, 1)), np.float32)
        for g in range(G):
            for d in range(head_dim):
                scaled_q[g, d] = decode(q[b, h * G + g, d], code) * scale
        for u in range(found * units):
            decode_row(mean_k[host_table[b, blocks[u // units]], h, u % units], row, mean_code)
            for g in range(G):
                total = np.float32(0)
                for d in range(head_dim):
                    total += scaled_q[g, d] * row[d]
                if soft_cap > 0:
                    total = soft_cap * np.float32(math.tanh(total / soft_cap))
                x[g, u] = total + log_count
        acc = np.zeros((G, head_dim), np.float32)
        for g in range(G):
            top, total = np.float32(-np.inf), np.float32(0)
            for u in range(found * units):
                top = max(top, x[g, u])
            for u in range(found * units):
                x[g, u] = np.float32(math.exp(x[g, u] - top))
                total += x[g, u]
            lse[t, b, h * G + g] = top + math.log(total) if found > 0 else -np.inf
            inverse = np.float32(1) / total if found > 0 else np.float32(0)
            for u in range(found * units):
                x[g, u] *= inverse
        for u in range(found * units):
            decode_row(mean_v[host_table[b, blocks[u // units]], h, u % units], row, mean_code)
            for g in range(G):
                for d in range(head_dim):
                    acc[g, d] += x[g, u] * row[d]
        out[t, b, h * G : (h + 1) * G] = acc


def attend_centroids(
    q: Tensor,
    mean_k: Tensor,
    mean_v: Tensor,
    host_table: Tensor,
    seq_lens: Tensor,
    selected_blocks: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    block_size: int,
) -> None:
    """Attend to the closed blocks that are not selected, each sub-unit as if all its tokens were their mean.

    Arguments as in `csrc_free_kernels/reference/attend_centroids.py`; q, mean_k and mean_v are fp32, bf16 or fp16,
    out and lse fp32.
    """
    attend_centroids_kernel(
        as_numpy(q), as_numpy(mean_k), as_numpy(mean_v), host_table.numpy(), seq_lens.numpy(),
        selected_blocks.numpy(), out.numpy(), lse.numpy(), block_size,
        np.float32(softmax_scale), np.float32(soft_cap or 0), code_of(q), code_of(mean_k),
    )  # fmt: skip
