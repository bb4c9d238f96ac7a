"""numba `sample`: thresholds by a radix search over order-preserving keys, then one draw a row."""

import math

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import _float_to_bits, as_numpy, code_of, decode
from csrc_free_kernels.cpu.sample_greedy import argmax_of
from csrc_free_kernels.reference import sample as truth
from csrc_free_kernels.reference.sample_greedy import check_logits

LOG2_E = np.float32(truth.LOG2_E)
LARGEST_SCALE = np.float32(3.0e38)
LOWEST_EXPONENT = np.float32(truth.LOWEST_EXPONENT)
C0, C1, C2, C3, C4 = (np.float32(c) for c in truth.EXP2_COEFFICIENTS)
M0, M1 = (np.int64(m) for m in truth.PHILOX_MULTIPLIERS)
W0, W1 = (np.int64(w) for w in truth.PHILOX_WEYL)
MASK_32 = np.int64(truth.MASK_32)


@nb.njit(cache=True)
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 on int64 words below 2^32; products wrap, which leaves the bits of uint64."""
    for _ in range(10):
        left, right = c0 * M0, c2 * M1
        c0, c2 = ((right >> 32) & MASK_32) ^ c1 ^ k0, ((left >> 32) & MASK_32) ^ c3 ^ k1
        c1, c3 = right & MASK_32, left & MASK_32
        k0, k1 = (k0 + W0) & MASK_32, (k1 + W1) & MASK_32
    return c0, c1, c2, c3


@nb.njit(cache=True)
def uniform_53(seed, position):
    zero = np.int64(0)
    words = philox(
        position & MASK_32, (position >> 32) & MASK_32, zero, zero, seed & MASK_32, (seed >> 32) & MASK_32
    )
    return (words[1] << 21) | (words[0] >> 11)


# No fastmath: every operation is rounded once, in the order of the reference.
@nb.njit(cache=True)
def weight_of(x, top, scale):
    a = max((x - top) * scale, LOWEST_EXPONENT)
    whole = np.float32(math.floor(a))
    f = a - whole
    p = (((C4 * f + C3) * f + C2) * f + C1) * f + C0
    return (np.int64((p * f + np.float32(1.0)) * np.float32(2.0**29)) << 11) >> np.int64(-whole)


@nb.njit(cache=True)
def key_of(x):
    """Order-preserving map float32 -> uint32; -0.0 ties with 0.0."""
    bits = _float_to_bits(x + np.float32(0.0))
    return ~bits if bits >> np.uint32(31) else bits | np.uint32(0x80000000)


@nb.njit(cache=True)
def threshold(keys, weights, target):
    """Return the largest key such that all keys at or above it together weigh at least `target`."""
    prefix = np.uint32(0)
    sums = np.empty(256, np.int64)
    for shift in (24, 16, 8, 0):
        sums[:] = 0
        for i in range(keys.size):
            if np.uint64(keys[i]) >> np.uint64(shift + 8) == np.uint64(prefix) >> np.uint64(shift + 8):
                sums[(keys[i] >> np.uint32(shift)) & np.uint32(255)] += weights[i]
        digit = 255
        while sums[digit] < target:
            target -= sums[digit]
            digit -= 1
        prefix |= np.uint32(digit) << np.uint32(shift)
    return prefix


@nb.njit(cache=True)
def drop_below(keys, weights, lowest):
    for i in range(keys.size):
        if keys[i] < lowest:
            weights[i] = 0


@nb.njit(cache=True)
def draw(row, code, best, temperature, top_k, top_p, uniform):
    """Draw from one row whose most likely token is `best`."""
    keys, weights = np.empty(row.size, np.uint32), np.empty(row.size, np.int64)
    top, scale = decode(row[best], code), min(LOG2_E / temperature, LARGEST_SCALE)
    for i in range(row.size):
        x = decode(row[i], code)
        keys[i], weights[i] = key_of(x), weight_of(x, top, scale)
    if 0 < top_k < row.size:
        drop_below(keys, weights, threshold(keys, np.ones(row.size, np.int64), np.int64(top_k)))
    if top_p < np.float32(1.0):
        target = np.int64(np.float64(top_p) * np.float64(weights.sum()))
        drop_below(keys, weights, threshold(keys, weights, max(target, np.int64(1))))
    total = weights.sum()
    rest = min(np.int64(np.float64(uniform) * 2.0**-53 * np.float64(total)), total - 1)
    for i in range(row.size):
        rest -= weights[i]
        if rest < 0:
            return i
    return best


# One row an iteration. logits [B, V] as float32 or 16-bit patterns.
@nb.njit(cache=True, parallel=True)
def sample_kernel(logits, code, positions, temperature, top_k, top_p, seed, tokens, bad):
    for b in nb.prange(logits.shape[0]):
        best = argmax_of(logits[b], code)
        if best < 0:
            tokens[b], bad[b] = 0, 1
        elif temperature[b] > np.float32(0.0):
            uniform = uniform_53(seed[b], positions[b])
            tokens[b] = draw(logits[b], code, best, temperature[b], top_k[b], top_p[b], uniform)
        else:
            tokens[b] = best


def sample(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    scratch: Tensor | None,
    tokens: Tensor,
    bad: Tensor,
) -> None:
    """Draw one token a row: a function of the row's logits, parameters, seed and position alone.

    Arguments as in `csrc_free_kernels/reference/sample.py`; `scratch` is not used.

    Raises:
        ValueError: logits of another shape or dtype, or with a strided last dim.
    """
    check_logits(logits)
    sample_kernel(
        as_numpy(logits), code_of(logits), positions.numpy(), temperature.numpy(), top_k.numpy(), top_p.numpy(),
        seed.numpy(), tokens.numpy(), bad.numpy(),
    )  # fmt: skip
