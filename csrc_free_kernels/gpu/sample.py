"""Triton `sample`: thresholds by a radix search over order-preserving keys, then one draw a row, without a sort.

Launches, all over (parts of a row, rows) but the last: the peaks of the parts; one search pass per four bits of the
logits' type for top-k, then for top-p, each adding to 16 sums of the row (how much lies at or above each digit); the
mass that every part keeps; the draw. Rows that need no search leave at once. All sums are integers, so the order of
the atomics does not matter; fused multiply-add is off, so weights have the bits of the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.sample_greedy import (
    FIRST_SUM,
    NUM_WARPS,
    PARTS,
    TILE,
    check_scratch,
    load_part,
    peak_kernel,
    peak_of_row,
    sortable,
    store_peak,
)
from csrc_free_kernels.reference import sample as truth
from csrc_free_kernels.reference.sample_greedy import SCRATCH_WORDS, check_logits

# Bits of the order-preserving key that can differ: bf16 is the upper half of fp32, fp16 fills 19 of its bits.
KEY_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}
DIGITS = tl.constexpr(16)
FIRST_MASS_SUM = tl.constexpr(256)
LOG2_E = tl.constexpr(truth.LOG2_E)
LOWEST_EXPONENT = tl.constexpr(truth.LOWEST_EXPONENT)
C0, C1, C2, C3, C4 = (tl.constexpr(c) for c in truth.EXP2_COEFFICIENTS)
M0, M1 = (tl.constexpr(m) for m in truth.PHILOX_MULTIPLIERS)
W0, W1 = (tl.constexpr(w) for w in truth.PHILOX_WEYL)
MASK_32 = tl.constexpr(truth.MASK_32)


# Philox-4x32-10 on int64 scalars below 2^32; products wrap, which leaves the bits of uint64.
@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        left, right = c0 * M0, c2 * M1
        c0, c2 = ((right >> 32) & MASK_32) ^ c1 ^ k0, ((left >> 32) & MASK_32) ^ c3 ^ k1
        c1, c3 = right & MASK_32, left & MASK_32
        k0, k1 = (k0 + W0) & MASK_32, (k1 + W1) & MASK_32
    return c0, c1, c2, c3


@triton.jit
def uniform_53(seed, position):
    zero = position & 0
    low, high, _, _ = philox(
        position & MASK_32, (position >> 32) & MASK_32, zero, zero, seed & MASK_32, (seed >> 32) & MASK_32
    )
    return (high << 21) | (low >> 11)


# As in the reference; b_top_key is the sortable key of the row's largest logit.
@triton.jit
def weigh(b_x, b_top_key, temperature):
    b_top = tl.where(b_top_key < 0, b_top_key ^ 0x7FFFFFFF, b_top_key).to(tl.float32, bitcast=True)
    b_scale = tl.minimum(tl.div_rn(tl.full((), LOG2_E, tl.float32), temperature), 3.0e38)
    b_a = tl.maximum((b_x - b_top) * b_scale, LOWEST_EXPONENT)
    b_whole = tl.floor(b_a)
    b_f = b_a - b_whole
    b_p = (((b_f * C4 + C3) * b_f + C2) * b_f + C1) * b_f + C0
    b_mantissa = ((b_p * b_f + 1.0) * 536870912.0).to(tl.int32).to(tl.int64)
    return (b_mantissa << 11) >> (-b_whole).to(tl.int32).to(tl.int64)


# The upper BITS bits of the key as unsigned numbers.
@triton.jit
def radix_key(b_x, BITS: tl.constexpr):
    return (sortable(b_x).to(tl.uint32, bitcast=True) ^ 0x80000000) >> (32 - BITS)


# Follow the search through its first `levels` levels: in each the largest digit at or above which the sum still
# reaches what is left of the target. p_sums [levels, 16].
@triton.jit
def narrow(p_sums, target, levels):
    o_digit = tl.arange(0, DIGITS)
    prefix = target & 0
    for level in range(levels):
        b_sums = tl.load(p_sums + level * DIGITS + o_digit)
        digit = tl.sum((b_sums >= target).to(tl.int64), axis=0) - 1
        target -= tl.sum(tl.where(o_digit == digit + 1, b_sums, 0), axis=0)
        prefix = prefix * DIGITS + digit
    return prefix.to(tl.uint32)


@triton.jit
def searches_k(k, V):
    return (k > 0) & (k < V)


# The mass that top-p keeps at least; the first sum of its search is the mass of all that top-k left.
@triton.jit
def mass_target(p_row, p):
    total = tl.load(p_row + FIRST_MASS_SUM)
    return tl.maximum((p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)


# The lowest key that top-k (and top-p) leave.
@triton.jit
def lowest_kept(p_row, k, p, V, LEVELS: tl.constexpr, AFTER_P: tl.constexpr):
    lowest = tl.full((), 0, tl.uint32)
    if searches_k(k, V):
        lowest = narrow(p_row + FIRST_SUM, k.to(tl.int64), LEVELS)
    if AFTER_P and p < 1.0:
        lowest = tl.maximum(lowest, narrow(p_row + FIRST_MASS_SUM, mass_target(p_row, p), LEVELS))
    return lowest


# Grid (parts, B). Adds to the sums of one level of the search for top-k (counts) or top-p (masses).
@triton.jit(do_not_specialize=["level"])
def search_kernel(
    logits, stride_row, temperature, top_k, top_p, scratch, level, V, parts,
    WORDS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, BY_MASS: tl.constexpr,
):  # fmt: skip
    i_part, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_row = scratch + i_b * WORDS
    t, k, p = tl.load(temperature + i_b), tl.load(top_k + i_b), tl.load(top_p + i_b)
    b_top_key, _, good = peak_of_row(p_row, parts)
    wanted = p < 1.0 if BY_MASS else searches_k(k, V)
    if wanted & good & (t > 0.0):
        p_sums = p_row + (FIRST_MASS_SUM if BY_MASS else FIRST_SUM)
        prefix = narrow(p_sums, mass_target(p_row, p) if BY_MASS else k.to(tl.int64), level)
        b_x = load_part(logits, stride_row, i_b, i_part, V, TILE)
        b_key = radix_key(b_x, BITS)
        if BY_MASS:
            lowest = lowest_kept(p_row, k, p, V, BITS // 4, False)
            b_weight = tl.where(b_key >= lowest, weigh(b_x, b_top_key, t), 0)
        else:
            b_weight = tl.full([TILE], 1, tl.int32)
        b_key = b_key >> (BITS - 4 - 4 * level).to(tl.uint32)
        b_weight = tl.where((b_key >> 4) == prefix, b_weight, 0)
        b_digit = (b_key & 15).to(tl.int32)
        if tl.max(b_weight, axis=0) > 0:  # late levels leave most parts without a candidate
            o_digit = tl.arange(0, DIGITS)
            b_sums = tl.zeros([DIGITS], tl.int64)
            for digit in tl.static_range(DIGITS):
                b_sum = tl.sum(tl.where(b_digit >= digit, b_weight, 0), axis=0)
                b_sums = tl.where(o_digit == digit, b_sum.to(tl.int64), b_sums)
            tl.atomic_add(p_sums + level * DIGITS + o_digit, b_sums, sem="relaxed")


# Grid (parts, B). The mass that each part keeps, behind the peaks of the row.
@triton.jit
def mass_kernel(
    logits, stride_row, temperature, top_k, top_p, scratch, V, parts,
    WORDS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    i_part, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_row = scratch + i_b * WORDS
    t, k, p = tl.load(temperature + i_b), tl.load(top_k + i_b), tl.load(top_p + i_b)
    b_top_key, _, good = peak_of_row(p_row, parts)
    if good & (t > 0.0):
        lowest = lowest_kept(p_row, k, p, V, BITS // 4, True)
        b_x = load_part(logits, stride_row, i_b, i_part, V, TILE)
        b_weight = tl.where(radix_key(b_x, BITS) >= lowest, weigh(b_x, b_top_key, t), 0)
        tl.store(p_row + PARTS + i_part, tl.sum(b_weight, axis=0))


# Grid (B). Finds the part in which the running mass passes the random number, then the token.
@triton.jit
def draw_kernel(
    logits, stride_row, positions, temperature, top_k, top_p, seed, scratch, tokens, bad, V, parts,
    WORDS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    p_row = scratch + i_b * WORDS
    t, k, p = tl.load(temperature + i_b), tl.load(top_k + i_b), tl.load(top_p + i_b)
    b_top_key, b_id, good = peak_of_row(p_row, parts)
    if good & (t > 0.0):
        o_part = tl.arange(0, PARTS)
        b_mass = tl.load(p_row + PARTS + o_part, mask=o_part < parts, other=0)
        total = tl.sum(b_mass, axis=0)
        bits = uniform_53(tl.load(seed + i_b), tl.load(positions + i_b))
        unit = tl.full((), 1.0 / 9007199254740992.0, tl.float64)
        rest = tl.minimum((bits.to(tl.float64) * unit * total.to(tl.float64)).to(tl.int64), total - 1)
        m_before = tl.cumsum(b_mass, axis=0) <= rest
        i_part = tl.sum(m_before.to(tl.int32), axis=0)
        rest -= tl.sum(tl.where(m_before, b_mass, 0), axis=0)
        lowest = lowest_kept(p_row, k, p, V, BITS // 4, True)
        b_x = load_part(logits, stride_row, i_b, i_part, V, TILE)
        b_weight = tl.where(radix_key(b_x, BITS) >= lowest, weigh(b_x, b_top_key, t), 0)
        b_before = (tl.cumsum(b_weight, axis=0) <= rest).to(tl.int32)
        b_id = (i_part * TILE + tl.sum(b_before, axis=0)).to(tl.int64)
    store_peak(tokens, bad, i_b, b_id, good)


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

    Arguments as in `csrc_free_kernels/reference/sample.py`; `scratch` int64 [>= B, SCRATCH_WORDS], contiguous,
    contents unspecified before and after. 11 launches on the current stream for bf16 (19 for fp32), no wait.

    Raises:
        ValueError: logits of another shape or dtype, with a strided last dim, or a scratch that is too small.
    """
    check_logits(logits)
    check_scratch(logits, scratch)
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, TILE)
    bits = KEY_BITS[logits.dtype]
    constants = {"WORDS": SCRATCH_WORDS, "TILE": TILE, "num_warps": NUM_WARPS}
    exact = constants | {"BITS": bits, "enable_fp_fusion": False}
    row, rules = (logits, logits.stride(0)), (temperature, top_k, top_p)
    peak_kernel[(parts, rows)](*row, scratch, vocab, ZERO_SUMS=True, **constants)
    for by_mass in (False, True):
        for level in range(bits // 4):
            search_kernel[(parts, rows)](*row, *rules, scratch, level, vocab, parts, BY_MASS=by_mass, **exact)
    mass_kernel[(parts, rows)](*row, *rules, scratch, vocab, parts, **exact)
    draw_kernel[(rows,)](*row, positions, *rules, seed, scratch, tokens, bad, vocab, parts, **exact)
