"""Triton `select`: the k-th largest value by a bitwise search, ids by prefix sums, then the heat."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.reference.select import check_arguments

MAX_BLOCKS = 32768  # a row is held in registers: 32 values a thread at this size
ELEMENTS_PER_WARP = 512  # 16 values a thread; a row of up to 512 blocks needs no barrier at all
LOWEST_KEY = tl.constexpr(-(2**31))  # below the key of -inf, so only for what may not be taken


# Order-preserving map float32 -> int32; NaN counts as -inf and -0.0 as 0.0.
@triton.jit
def sortable(b_x):
    b_x = tl.where(b_x == b_x, b_x, float("-inf"))
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits == LOWEST_KEY, 0, b_bits)
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


# Marks the `count` largest keys, ties to the lower index; `count` >= 1 and as many keys are above LOWEST_KEY.
@triton.jit
def best(b_key, count):
    b_threshold = tl.full((), LOWEST_KEY, tl.int32)
    b_reached = tl.full((), 2**31 - 1, tl.int32)  # how many keys are at or above the threshold
    b_bit = tl.full((), 31, tl.int32)
    # the search ends once exactly `count` keys are at or above the threshold: only a tie goes to the last bit
    while (b_bit >= 0) & (b_reached != count):
        b_trial = b_threshold ^ (tl.full((), 1, tl.int32) << b_bit)
        b_above = tl.sum((b_key >= b_trial).to(tl.int32), axis=0)
        b_threshold = tl.where(b_above >= count, b_trial, b_threshold)
        b_reached = tl.where(b_above >= count, b_above, b_reached)
        b_bit -= 1
    m_best = b_key >= b_threshold
    if b_reached > count:
        m_tie = b_key == b_threshold
        b_rank = tl.cumsum(m_tie.to(tl.int32), axis=0)
        b_larger = tl.sum((b_key > b_threshold).to(tl.int32), axis=0)
        m_best = m_best & ((b_key > b_threshold) | (b_rank <= count - b_larger))
    return m_best


# Grid (B * Hkv), one (row, head) a program. block_scores, heat fp32 [B, Hkv, N]; selected_blocks [B, Hkv, S]
# and num_selected [B, Hkv] contiguous. N_P and S_P are N and S rounded up to powers of two.
@triton.jit
def select_kernel(
    block_scores, heat, seq_lens, selected_blocks, num_selected, block_size, heat_decay, num_blocks, Hkv,
    stride_sb, stride_sh, stride_hb, stride_hh,
    SINK: tl.constexpr, RECENT: tl.constexpr, QUERY: tl.constexpr, AGNOSTIC: tl.constexpr,
    NORMALISE: tl.constexpr, S: tl.constexpr, S_P: tl.constexpr, N_P: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_b = i_row // Hkv
    i_h = i_row % Hkv
    nb = (tl.load(seq_lens + i_b) + block_size - 1) // block_size
    o_s = tl.arange(0, S_P)
    o_n = tl.arange(0, N_P)
    p_selected = selected_blocks + i_row * S
    m_n = o_n < nb
    if (QUERY > 0) | (NORMALISE != "none"):
        p_scores = block_scores + i_b * stride_sb + i_h * stride_sh + o_n
    if (AGNOSTIC > 0) | (NORMALISE != "none"):
        p_heat = heat + i_b * stride_hb + i_h * stride_hh + o_n
    if (nb <= S) | (QUERY + AGNOSTIC == 0):
        b_count = tl.where(nb <= S, nb, SINK + RECENT)
        b_id = tl.where((nb <= S) | (o_s < SINK), o_s, o_s - SINK + nb - RECENT)
        tl.store(p_selected + o_s, tl.where(o_s < b_count, b_id, -1), mask=o_s < S)
        tl.store(num_selected + i_row, b_count)
    else:
        m_chosen = (o_n < SINK) | ((o_n >= nb - RECENT) & m_n)
        if QUERY > 0:
            b_key = sortable(tl.load(p_scores, mask=m_n, other=float("-inf")))
            m_chosen = m_chosen | best(tl.where(m_n & ~m_chosen, b_key, LOWEST_KEY), QUERY)
        if AGNOSTIC > 0:
            b_key = sortable(tl.load(p_heat, mask=m_n, other=float("-inf")))
            m_chosen = m_chosen | best(tl.where(m_n & ~m_chosen, b_key, LOWEST_KEY), AGNOSTIC)
        b_place = tl.cumsum(m_chosen.to(tl.int32), axis=0) - 1
        tl.store(p_selected + b_place, o_n, mask=m_chosen)
        m_rest = (o_s >= SINK + RECENT + QUERY + AGNOSTIC) & (o_s < S)
        tl.store(p_selected + o_s, tl.full([S_P], -1, tl.int32), mask=m_rest)
        tl.store(num_selected + i_row, SINK + RECENT + QUERY + AGNOSTIC)
    if NORMALISE != "none":
        b_score = tl.load(p_scores, mask=m_n, other=float("-inf"))
        m_finite = tl.abs(b_score) < float("inf")
        if NORMALISE == "softmax":
            b_score = tl.where(m_finite, b_score, float("-inf"))
            b_score = tl.exp(b_score - tl.maximum(tl.max(b_score, axis=0), -3.0e38))
        b_score = tl.where(m_finite, b_score, 0.0)
        b_total = tl.sum(b_score, axis=0)
        b_heat = tl.load(p_heat, mask=m_n, other=0.0)
        tl.store(p_heat, b_heat * heat_decay + b_score / tl.where(b_total == 0, 1.0, b_total), mask=m_n)


def select(
    block_scores: Tensor | None,
    heat: Tensor | None,
    seq_lens: Tensor,
    selected_blocks: Tensor,
    num_selected: Tensor,
    *,
    block_size: int,
    sink_blocks: int,
    recent_blocks: int,
    query_blocks: int,
    agnostic_blocks: int,
    heat_decay: float,
    normalise: str,
) -> None:
    """Select forced, best-scoring and hottest blocks of every (row, head), then update the heat.

    Arguments as in `csrc_free_kernels/reference/select.py`; `selected_blocks` and `num_selected` are
    contiguous, the last dim of the others too. One launch on the current stream, no wait.

    Raises:
        ValueError: an unknown `normalise`, scores or heat are needed and not given, a strided tensor, or more
            blocks than a program can hold (32768).
    """
    check_arguments(block_scores, heat, query_blocks, agnostic_blocks, normalise)
    num_rows, num_kv_heads, width = selected_blocks.shape
    given = [t for t in (block_scores, heat) if t is not None]
    num_blocks = given[0].shape[2] if given else 1
    if num_blocks > MAX_BLOCKS:
        raise ValueError(f"select handles up to {MAX_BLOCKS} blocks, not {num_blocks}")
    if any(t.stride(2) != 1 for t in given) or not (
        selected_blocks.is_contiguous() and num_selected.is_contiguous()
    ):
        raise ValueError("scores and heat need a contiguous last dim, the outputs must be contiguous")
    padded = triton.next_power_of_2(num_blocks)
    select_kernel[(num_rows * num_kv_heads,)](
        block_scores, heat, seq_lens, selected_blocks, num_selected, block_size, heat_decay, num_blocks,
        num_kv_heads, *(block_scores.stride()[:2] if block_scores is not None else (0, 0)),
        *(heat.stride()[:2] if heat is not None else (0, 0)),
        SINK=sink_blocks, RECENT=recent_blocks, QUERY=query_blocks, AGNOSTIC=agnostic_blocks,
        NORMALISE=normalise, S=width, S_P=triton.next_power_of_2(width), N_P=padded,
        num_warps=max(1, min(32, padded // ELEMENTS_PER_WARP)),
    )  # fmt: skip
