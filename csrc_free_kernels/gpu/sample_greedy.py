"""Triton `sample_greedy`: the largest logit of every part of a row, then of the row."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.reference.sample_greedy import SCRATCH_WORDS, check_logits

TILE = 4096  # logits of a part, at most 64 parts a row: enough programs for a whole GPU from B = 2 on
NUM_WARPS = 8
PARTS = tl.constexpr(64)
SUMS = tl.constexpr(256)  # the words behind the parts and their masses, zeroed for `sample`
FIRST_SUM = tl.constexpr(128)
LOW_WORD = tl.constexpr(0x7FFFFFFF)
KEY_OF_INF = tl.constexpr(0x7F800000)
KEY_OF_MINUS_INF = tl.constexpr(-0x7F800001)


# Order-preserving map float32 -> int32; -0.0 ties with 0.0.
@triton.jit
def sortable(b_x):
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_x == 0, 0, b_bits)
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


@triton.jit
def load_part(logits, stride_row, i_b, i_part, V, TILE: tl.constexpr):
    """Logits of one part of row i_b as fp32, -inf past the end."""
    o_v = i_part * TILE + tl.arange(0, TILE)
    return tl.load(logits + i_b * stride_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)


# Grid (parts, B). A part's peak is key << 32 | (2^31 - 1 - id), so that the maximum is the largest logit with
# the lowest id; NaN counts as +inf, which no row may hold. scratch [B, WORDS] int64.
@triton.jit
def peak_kernel(
    logits, stride_row, scratch, V, WORDS: tl.constexpr, TILE: tl.constexpr, ZERO_SUMS: tl.constexpr
):
    i_part, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_x = load_part(logits, stride_row, i_b, i_part, V, TILE)
    b_key = sortable(tl.where(b_x < float("inf"), b_x, float("inf")))
    b_id = i_part * TILE + tl.arange(0, TILE)
    b_peak = (b_key.to(tl.int64) << 32) | (b_id ^ LOW_WORD).to(tl.int64)
    p_row = scratch + i_b * WORDS
    tl.store(p_row + i_part, tl.max(b_peak, axis=0))
    if ZERO_SUMS and i_part == 0:
        tl.store(p_row + FIRST_SUM + tl.arange(0, SUMS), tl.zeros([SUMS], tl.int64))


# The key of the row's largest logit, its id, and whether the row can be sampled.
@triton.jit
def peak_of_row(p_row, parts):
    o_part = tl.arange(0, PARTS)
    b_peak = tl.max(tl.load(p_row + o_part, mask=o_part < parts, other=-(2**63)), axis=0)
    b_key = (b_peak >> 32).to(tl.int32)
    return b_key, (b_peak & LOW_WORD) ^ LOW_WORD, (b_key < KEY_OF_INF) & (b_key > KEY_OF_MINUS_INF)


@triton.jit
def store_peak(tokens, bad, i_b, b_id, good):
    tl.store(tokens + i_b, tl.where(good, b_id, 0))
    tl.store(bad + i_b, 1, mask=~good)


# Grid (B).
@triton.jit
def take_kernel(scratch, tokens, bad, parts, WORDS: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    _, b_id, good = peak_of_row(scratch + i_b * WORDS, parts)
    store_peak(tokens, bad, i_b, b_id, good)


def check_scratch(logits: Tensor, scratch: Tensor | None) -> None:
    """Raise ValueError where the workspace does not hold the rows."""
    if scratch is None or scratch.shape[0] < logits.shape[0] or scratch.shape[1:] != (SCRATCH_WORDS,):
        shape = None if scratch is None else list(scratch.shape)
        raise ValueError(f"scratch must be int64 [>= {logits.shape[0]}, {SCRATCH_WORDS}], not {shape}")


def sample_greedy(logits: Tensor, scratch: Tensor | None, tokens: Tensor, bad: Tensor) -> None:
    """Take the most likely token of every row, ties to the lowest id.

    Arguments as in `csrc_free_kernels/reference/sample_greedy.py`; `scratch` int64 [>= B, SCRATCH_WORDS],
    contiguous, contents unspecified before and after. Two launches on the current stream, no wait.

    Raises:
        ValueError: logits of another shape or dtype, with a strided last dim, or a scratch that is too small.
    """
    check_logits(logits)
    check_scratch(logits, scratch)
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, TILE)
    peak_kernel[(parts, rows)](
        logits, logits.stride(0), scratch, vocab, WORDS=SCRATCH_WORDS, TILE=TILE, ZERO_SUMS=False,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    take_kernel[(rows,)](scratch, tokens, bad, parts, WORDS=SCRATCH_WORDS, num_warps=1)
