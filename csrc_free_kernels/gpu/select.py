"""Triton `select`: the k-th largest value by a search over bit patterns, ids by prefix sums, then the heat."""

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.counts import count_marked, cuts
from csrc_free_kernels.gpu.score_mean import block_at
from csrc_free_kernels.reference import select as rules
from csrc_free_kernels.reference.select import check_arguments, limit_of

MAX_BLOCKS = 32768  # a row is held in registers: 32 values a thread at this size
MAX_WARPS = 16
WEIGHTS, SHARES = tl.constexpr(2.0**rules.WEIGHT_BITS), tl.constexpr(2**rules.LIMIT_BITS)
OCTAVE = tl.constexpr(2**23)  # keys between a value and twice it
LOWEST_KEY = tl.constexpr(-(2**31))  # below the key of -inf, so only for what may not be taken


# Order-preserving map float32 -> int32; NaN counts as -inf and -0.0 as 0.0.
@triton.jit
def sortable(b_x):
    b_x = tl.where(b_x == b_x, b_x, float("-inf"))
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits == LOWEST_KEY, 0, b_bits)
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


# Marks the `num` largest keys, ties to the lower index; `num` >= 1 and as many keys are above LOWEST_KEY.
# Cuts the range of the keys in parts; at or above `b_low` are always `num` keys or more, at or above `b_high`
# fewer. Ends once they are exactly `num`, so only a tie is searched for to the last bit. The first cuts stay close to
# the largest key: values far below, as zeros, take up most of the range and hold nothing that is looked for.
@triton.jit
def best(b_key, num, N_P: tl.constexpr):
    b_low = tl.min(tl.where(b_key > LOWEST_KEY, b_key, 2**31 - 1), axis=0)
    b_high = tl.max(b_key, axis=0) + 1  # no key is above that of infinity
    b_reached = tl.full((), -1, tl.int32)
    b_widest = tl.full((), OCTAVE, tl.uint32)
    while ((b_high - b_low).to(tl.uint32) > 1) & (b_reached != num):
        b_1, b_2, b_3 = cuts(b_low, b_high, b_widest, N_P)
        n_1, n_2, n_3 = count_marked(b_key >= b_1, b_key >= b_2, b_key >= b_3, N_P)
        b_high = tl.where(n_1 < num, b_1, tl.where(n_2 < num, b_2, tl.where(n_3 < num, b_3, b_high)))
        b_low = tl.where(n_3 >= num, b_3, tl.where(n_2 >= num, b_2, tl.where(n_1 >= num, b_1, b_low)))
        b_reached = tl.where(n_3 >= num, n_3, tl.where(n_2 >= num, n_2, tl.where(n_1 >= num, n_1, b_reached)))
        b_widest = tl.minimum(b_widest, 2**28) * 4
    m_best = b_key >= b_low
    if b_reached != num:
        m_tie = b_key == b_low
        b_rank = tl.cumsum(m_tie.to(tl.int32), axis=0)
        b_larger = tl.sum((b_key > b_low).to(tl.int32), axis=0)
        m_best = m_best & ((b_key > b_low) | (b_rank <= num - b_larger))
    return m_best


# What is chosen, and the `num` largest of the other values in m_n.
@triton.jit
def with_best(m_chosen, m_n, b_value, num, N_P: tl.constexpr):
    b_key = tl.where(m_n & ~m_chosen, sortable(b_value), LOWEST_KEY)
    return m_chosen | best(b_key, num, N_P)


# How many blocks a rule takes by score, of those marked in m_open; m_scored marks all that have a finite score. The
# arithmetic of `_allowance` in the reference: integers, so that no order of additions shows.
@triton.jit
def allowance(b_score, m_scored, m_open, limit, RULE: tl.constexpr):
    b_top = tl.max(tl.where(m_scored, b_score, float("-inf")), axis=0)
    if RULE == "scored":
        m_taken = m_open
    elif RULE == "margin":
        m_taken = m_open & (b_score > b_top - limit)
    else:
        m_weighs = m_scored & (b_score > 0)
        b_x = tl.div_rn(
            tl.where(m_weighs, b_score, 0.0), tl.where(b_top > 0, b_top, 1.0) + tl.zeros_like(b_score)
        )
        b_x = b_x * WEIGHTS
        b_weight = b_x.to(tl.int32)
        b_weight += (b_weight.to(tl.float32) < b_x).to(tl.int32)
        b_share = tl.sum(b_weight.to(tl.int64), axis=0) * limit
        if RULE == "threshold":
            m_taken = m_open & (b_weight > b_share // SHARES)
        else:
            b_rest = tl.where(m_open, b_weight, 0)
            b_forced = tl.sum(tl.where(m_open, 0, b_weight).to(tl.int64), axis=0)
            m_taken = reaching(b_rest, (b_share + (SHARES - 1)) // SHARES - b_forced)
    return tl.sum(m_taken.to(tl.int32), axis=0)


# As many elements as the fewest of the weights, the heaviest first, that add up to `needed`; all of them hold it.
@triton.jit
def reaching(b_weight, needed):
    b_low = tl.full((), 0, tl.int32)
    b_high = tl.max(b_weight, axis=0) + 1
    while (
        b_high - b_low > 1
    ):  # what weighs b_low or more adds up to enough, what weighs b_high or more does not
        b_middle = (b_low + b_high) // 2
        b_sum = tl.sum(tl.where(b_weight >= b_middle, b_weight, 0).to(tl.int64), axis=0)
        b_low = tl.where(b_sum >= needed, b_middle, b_low)
        b_high = tl.where(b_sum >= needed, b_high, b_middle)
    m_above = b_weight > b_low
    b_left = needed - tl.sum(tl.where(m_above, b_weight, 0).to(tl.int64), axis=0)
    m_equal = b_weight == b_low
    b_rank = tl.cumsum(m_equal.to(tl.int32), axis=0) - 1
    return (needed > 0) & (m_above | (m_equal & (b_rank.to(tl.int64) * b_low < b_left)))


# The blocks that a row of `nb` blocks attends to, as a mask [N_P]: forced, best scores, hottest.
@triton.jit
def choose(
    b_score, b_heat, nb, limit,
    SINK: tl.constexpr, RECENT: tl.constexpr, QUERY: tl.constexpr, AGNOSTIC: tl.constexpr, RULE: tl.constexpr,
    S: tl.constexpr, N_P: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, N_P)
    m_n = o_n < nb
    m_chosen = m_n
    if RULE != "fixed":
        m_chosen = ((o_n < SINK) | (o_n >= nb - RECENT)) & m_n
        m_scored = m_n & (tl.abs(b_score) < float("inf"))
        m_open = m_scored & ~m_chosen
        num = tl.minimum(allowance(b_score, m_scored, m_open, limit, RULE), QUERY)
        if num > 0:
            m_chosen = m_chosen | best(tl.where(m_open, sortable(b_score), LOWEST_KEY), num, N_P)
        if AGNOSTIC > 0:
            m_open = m_open & ~m_chosen
            num = tl.minimum(tl.sum(m_open.to(tl.int32), axis=0), AGNOSTIC)
            if num > 0:
                m_chosen = m_chosen | best(tl.where(m_open, sortable(b_heat), LOWEST_KEY), num, N_P)
    elif nb > S:
        m_chosen = (o_n < SINK) | ((o_n >= nb - RECENT) & m_n)
        if (
            N_P <= 1024
        ):  # one loop, so that a step fetches the code of a search once; more values would spill in it
            for i_pass in range(QUERY == 0, 1 + (AGNOSTIC > 0)):
                b_value, num = tl.where(i_pass == 0, b_score, b_heat), tl.where(i_pass == 0, QUERY, AGNOSTIC)
                m_chosen = with_best(m_chosen, m_n, b_value, num, N_P)
        else:
            if QUERY > 0:
                m_chosen = with_best(m_chosen, m_n, b_score, QUERY, N_P)
            if AGNOSTIC > 0:
                m_chosen = with_best(m_chosen, m_n, b_heat, AGNOSTIC, N_P)
    return m_chosen


# How many of the first i + 1 elements are marked, for each i: within pieces of 8, which do not wait for each other,
# and over them.
@triton.jit
def ranks(m, N_P: tl.constexpr):
    PIECE: tl.constexpr = 8 if N_P >= 256 else 1
    b_m = tl.reshape(m.to(tl.int32), [N_P // PIECE, PIECE])
    b_sum = tl.sum(b_m, axis=1)
    b_before = tl.cumsum(b_sum, axis=0) - b_sum
    return tl.reshape(tl.cumsum(b_m, axis=1) + b_before[:, None], [N_P])


# Lists the blocks that one (row, head) attends to, ascending and then -1; returns how many there are. With R > 1 what
# is chosen from are places among the blocks of the groups that p_groups lists, R each.
@triton.jit
def select_blocks(
    b_score, b_heat, nb, limit, p_groups, p_selected, p_num,
    SINK: tl.constexpr, RECENT: tl.constexpr, QUERY: tl.constexpr, AGNOSTIC: tl.constexpr, RULE: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, S_P: tl.constexpr, N_P: tl.constexpr,
):  # fmt: skip
    o_s = tl.arange(0, S_P)
    b_count = tl.where(nb <= S, nb, SINK + RECENT + QUERY + AGNOSTIC)
    if QUERY + AGNOSTIC == 0:
        b_id = tl.where((nb <= S) | (o_s < SINK), o_s, o_s - SINK + nb - RECENT)
        tl.store(p_selected + o_s, block_at(p_groups, b_id, o_s < b_count, R), mask=o_s < b_count)
    else:
        m_chosen = choose(b_score, b_heat, nb, limit, SINK, RECENT, QUERY, AGNOSTIC, RULE, S, N_P)
        if RULE != "fixed":
            b_count = tl.sum(m_chosen.to(tl.int32), axis=0)
        b_place = ranks(m_chosen, N_P) - 1
        b_id = block_at(p_groups, tl.arange(0, N_P), m_chosen, R)
        tl.store(p_selected + b_place, b_id, mask=m_chosen)
    tl.store(p_selected + o_s, tl.full([S_P], -1, tl.int32), mask=(o_s >= b_count) & (o_s < S))
    tl.store(p_num, b_count)
    return b_count


# heat = decay * heat + normalised scores, for the blocks that exist.
@triton.jit
def fold_heat(p_heat, b_heat, b_score, m_n, heat_decay, NORMALISE: tl.constexpr):
    m_finite = tl.abs(b_score) < float("inf")
    if NORMALISE == "softmax":
        b_score = tl.where(m_finite, b_score, float("-inf"))
        b_score = tl.exp(b_score - tl.maximum(tl.max(b_score, axis=0), -3.0e38))
    b_score = tl.where(m_finite, b_score, 0.0)
    b_total = tl.sum(b_score, axis=0)
    tl.store(p_heat, b_heat * heat_decay + b_score / tl.where(b_total == 0, 1.0, b_total), mask=m_n)


# Grid (B * Hkv,), one (row, head) a program. block_scores, heat fp32 [B, Hkv, N]; selected_blocks
# [B, Hkv, S] and num_selected [B, Hkv] contiguous. N_P and S_P are N and S rounded up to powers of two.
@triton.jit
def select_kernel(
    block_scores, heat, seq_lens, due, selected_blocks, num_selected, block_size, heat_decay, limit, Hkv,
    stride_sb, stride_sh, stride_hb, stride_hh,
    SINK: tl.constexpr, RECENT: tl.constexpr, QUERY: tl.constexpr, AGNOSTIC: tl.constexpr, RULE: tl.constexpr,
    NORMALISE: tl.constexpr, DUE: tl.constexpr, S: tl.constexpr, S_P: tl.constexpr, N_P: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = (tl.program_id(0) // Hkv).to(tl.int64), (tl.program_id(0) % Hkv).to(tl.int64)
    seq_len = tl.load(seq_lens + i_b)
    if DUE and (tl.load(due + i_b) == 0) & (seq_len > 0):
        return
    nb = (seq_len + block_size - 1) // block_size
    o_n = tl.arange(0, N_P)
    m_n = o_n < nb
    b_score, b_heat = tl.zeros([N_P], tl.float32), tl.zeros([N_P], tl.float32)
    if (QUERY > 0) | (NORMALISE != "none"):
        p_scores = block_scores + i_b * stride_sb + i_h * stride_sh + o_n
        b_score = tl.load(p_scores, mask=m_n, other=float("-inf"))
    if (AGNOSTIC > 0) | (NORMALISE != "none"):
        p_heat = heat + i_b * stride_hb + i_h * stride_hh + o_n
        b_heat = tl.load(p_heat, mask=m_n, other=0.0)
    select_blocks(
        b_score, b_heat, nb, limit, seq_lens, selected_blocks + i_row * S, num_selected + i_row,
        SINK, RECENT, QUERY, AGNOSTIC, RULE, 1, S, S_P, N_P,
    )  # fmt: skip
    if NORMALISE != "none":
        fold_heat(p_heat, b_heat, b_score, m_n, heat_decay, NORMALISE)


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
    rule: str = "fixed",
    limit: float = 0.0,
    due: Tensor | None = None,
) -> None:
    """Select forced, best-scoring and hottest blocks of every (row, head), then update the heat.

    Arguments as in `csrc_free_kernels/reference/select.py`; `selected_blocks` and `num_selected` are
    contiguous, the last dim of the others too. One launch on the current stream, no wait.

    Raises:
        ValueError: as the reference, a strided tensor, or more blocks than a program can hold (32768).
    """
    check_arguments(block_scores, heat, query_blocks, agnostic_blocks, normalise, rule, limit)
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
        block_scores, heat, seq_lens, due, selected_blocks, num_selected, block_size, heat_decay,
        limit_of(rule, limit), num_kv_heads,
        *(block_scores.stride()[:2] if block_scores is not None else (0, 0)),
        *(heat.stride()[:2] if heat is not None else (0, 0)),
        SINK=sink_blocks, RECENT=recent_blocks, QUERY=query_blocks, AGNOSTIC=agnostic_blocks,
        RULE=rule, NORMALISE=normalise, DUE=due is not None, S=width, S_P=triton.next_power_of_2(width), N_P=padded,
        num_warps=warps_of(padded),
    )  # fmt: skip


def warps_of(padded: int) -> int:
    """Warps that select among `padded` blocks: few, as every step of the search waits for all of them."""
    return max(1, min(4, padded // 64), min(MAX_WARPS, padded // 256))
