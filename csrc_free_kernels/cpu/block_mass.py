"""numba `block_mass`: how the weights of a step's attention are spread over the blocks it attended to."""

import math

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.attend import block_logits, flat
from csrc_free_kernels.cpu.bits import FASTMATH, as_numpy, code_of, decode


# One iteration: a (row, KV head). q [B, Hq, D]; k_pool flat, k_stride elements a slot; ids, slots, mass [B, Hkv, S].
@nb.njit(cache=True, parallel=True, fastmath=FASTMATH)
def block_mass_kernel(
    q, k_pool, k_stride, code, block_ids, block_slots, seq_lens, lse, mass, C, scale, soft_cap
):
    num_rows, num_kv_heads, num_ids = block_ids.shape
    G, head_dim = q.shape[1] // num_kv_heads, q.shape[2]
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        scaled_q, rows = np.empty((G, head_dim), np.float32), np.empty((4, head_dim), np.float32)
        x = np.zeros((G, C + 3), np.float32)
        for g in range(G):
            for d in range(head_dim):
                scaled_q[g, d] = decode(q[b, h * G + g, d], code) * scale
        for s in range(num_ids):
            slot, there = (
                np.int64(block_slots[b, h, s]),
                min(C, seq_lens[b] - np.int64(block_ids[b, h, s]) * C),
            )
            total = np.float32(0)
            if slot >= 0 and there > 0:
                block_logits(k_pool, slot * k_stride, 0, there, scaled_q, rows, x, code)
                for g in range(G):
                    for c in range(there):
                        y = x[g, c]
                        if soft_cap > 0:
                            y = soft_cap * np.float32(math.tanh(y / soft_cap))
                        total += np.float32(math.exp(y - lse[b, h * G + g]))
            mass[b, h, s] = total / np.float32(G)


def block_mass(
    q: Tensor,
    k_pool: Tensor,
    block_ids: Tensor,
    block_slots: Tensor,
    seq_lens: Tensor,
    lse: Tensor,
    mass: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
) -> None:
    """Sum the attention weights of every block that has a slot, averaged over the group's query heads.

    Arguments as in `csrc_free_kernels/reference/block_mass.py`; q and k_pool (token stride D) are fp32, bf16 or fp16,
    lse and mass fp32.
    """
    block_mass_kernel(
        as_numpy(q), *flat(k_pool), code_of(q), block_ids.numpy(), block_slots.numpy(), seq_lens.numpy(),
        lse.numpy(), mass.numpy(), k_pool.shape[1], np.float32(softmax_scale), np.float32(soft_cap or 0),
    )  # fmt: skip
