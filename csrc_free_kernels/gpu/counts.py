"""Counts that searches in Triton kernels share: three in one reduction."""

import triton
import triton.language as tl


@triton.jit
def count_three(m_1, m_2, m_3, SIZE: tl.constexpr):
    """How many of SIZE elements each mask marks; with SIZE above 512 none may mark all 1024.

    The counts travel as fields of one word. In 32 bits a warp adds them up in a single instruction.
    """
    WORD: tl.constexpr = tl.int32 if SIZE <= 1024 else tl.int64
    FIELD: tl.constexpr = 10 if SIZE <= 1024 else 21
    b_word = m_1.to(WORD) + (m_2.to(WORD) << FIELD) + (m_3.to(WORD) << (2 * FIELD))
    b_word = tl.sum(b_word, axis=0)
    MASK: tl.constexpr = (1 << FIELD) - 1
    return (
        (b_word & MASK).to(tl.int32),
        ((b_word >> FIELD) & MASK).to(tl.int32),
        (b_word >> (2 * FIELD)).to(tl.int32),
    )
