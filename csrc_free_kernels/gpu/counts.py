"""Counts that searches in Triton kernels share: several in one reduction."""

import triton
import triton.language as tl

FEW = tl.constexpr(1024)  # elements up to which three counts fit one word of 32 bits, beyond it two


@triton.jit
def thresholds(low, high, SIZE: tl.constexpr):
    """Thresholds that cut `low .. high` (int64) in four, or, for many elements, in three: then two are equal."""
    if SIZE <= FEW:
        step = tl.maximum((high - low) // 4, 1)
        return low + step, low + 2 * step, low + 3 * step
    else:
        step = tl.maximum((high - low) // 3, 1)
        return low + step, low + 2 * step, low + 2 * step


@triton.jit
def cuts(low, high, widest, SIZE: tl.constexpr):
    """Thresholds in low + 1 .. high - 1 (int32, at least 2 apart, maybe 2**32), ascending, as `thresholds`.

    They lie at the upper end of the range, parts of at most `widest` (uint32) below each other.
    """
    span = (high - low).to(tl.uint32)  # wraps to the difference
    PARTS: tl.constexpr = 4 if SIZE <= FEW else 3
    step = tl.maximum(tl.minimum(span // PARTS, widest), 1)
    past = span - 1  # the farthest from the upper end
    cut_1 = high - tl.minimum((PARTS - 1) * step, past).to(tl.int32)
    cut_2 = high - tl.minimum((PARTS - 2) * step, past).to(tl.int32)
    return cut_1, cut_2, high - step.to(tl.int32) if SIZE <= FEW else cut_2


@triton.jit
def count_marked(m_1, m_2, m_3, SIZE: tl.constexpr):
    """How many of SIZE elements each mask marks, not all SIZE; beyond FEW the third mask counts as the second.

    The counts travel as fields of one 32-bit word, which a warp adds up in a single instruction.
    """
    if SIZE <= FEW:
        b_word = m_1.to(tl.int32) + (m_2.to(tl.int32) << 10) + (m_3.to(tl.int32) << 20)
        b_word = tl.sum(b_word, axis=0)
        return b_word & 1023, (b_word >> 10) & 1023, b_word >> 20
    else:
        b_word = tl.sum(m_1.to(tl.int32) + (m_2.to(tl.int32) << 16), axis=0)
        return b_word & 65535, b_word >> 16, b_word >> 16
