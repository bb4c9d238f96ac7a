"""numba `select`: the k-th largest value by a bitwise search, one pass to emit the ids, then the heat."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import FASTMATH
from csrc_free_kernels.reference.select import LIMIT_BITS, RULES, WEIGHT_BITS, check_arguments, limit_of

LOWEST_KEY = np.int32(-(2**31))  # below the key of -inf, so only for what may not be taken
FIXED, SCORED, THRESHOLD, MASS, MARGIN = (RULES.index(name) for name in RULES)
SHARES = np.int64(1 << LIMIT_BITS)
MODES = {"none": 0, "sum": 1, "softmax": 2}
NO_ROWS = np.empty(0, np.int32)
NOTHING = np.empty((0, 0, 0), np.float32)  # stands for scores or heat that are not given


@nb.njit(cache=True)
def sortable(x, keys):
    """Order-preserving map of float32 bits (as int32) to int32; NaN counts as -inf and -0.0 as 0.0."""
    for i in range(keys.size):
        bits = x[i]
        if (bits & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000):
            bits = np.int32(-8388608)  # the bits of -inf
        elif bits == LOWEST_KEY:
            bits = np.int32(0)
        keys[i] = bits ^ np.int32(0x7FFFFFFF) if bits < 0 else bits


@nb.njit(cache=True)
def take_best(x, chosen, keys, count):
    """Mark the `count` largest unmarked values of x (float32 bits), ties to the lower id; uses `keys`."""
    sortable(x, keys)
    for i in range(keys.size):
        if chosen[i]:
            keys[i] = LOWEST_KEY
    threshold, reached, bit = LOWEST_KEY, np.int64(keys.size + 1), 31
    while bit >= 0 and reached != count:
        trial = np.int32(threshold ^ np.int32(np.int64(1) << bit))
        above = np.int32(0)
        for i in range(keys.size):
            above += np.int32(keys[i] >= trial)
        if above >= count:
            threshold, reached = trial, np.int64(above)
        bit -= 1
    ties = count
    for i in range(keys.size):
        ties -= keys[i] > threshold
    for i in range(keys.size):
        if keys[i] > threshold:
            chosen[i] = True
        elif keys[i] == threshold and ties > 0:
            chosen[i] = True
            ties -= 1


@nb.njit(cache=True)
def allowance(scores, forced, rule, share, margin):
    """How many blocks a rule takes by score; the arithmetic of `_allowance` in the reference."""
    top = np.float32(-np.inf)
    for x in scores:
        if np.isfinite(x):
            top = max(top, x)
    weight = np.zeros(scores.size, np.int64)
    count, total, needed = 0, np.int64(0), np.int64(0)
    for i in range(scores.size):
        x = scores[i]
        if rule in (SCORED, MARGIN):
            count += np.isfinite(x) and not forced[i] and (rule == SCORED or x > top - margin)
        elif np.isfinite(x) and x > 0:
            weight[i] = np.int64(np.ceil(np.float32(x / top) * np.float32(1 << WEIGHT_BITS)))
            total += weight[i]
            needed -= weight[i] if forced[i] else 0
    if rule in (SCORED, MARGIN):
        return count
    total *= share
    if rule == THRESHOLD:
        for i in range(scores.size):
            count += not forced[i] and weight[i] > total // SHARES
        return count
    needed += (total + SHARES - 1) // SHARES
    weight[forced] = 0
    falling = np.sort(weight)[::-1]
    while count < falling.size and needed > 0:
        needed -= falling[count]
        count += 1
    return count


@nb.njit(cache=True)
def take_by_rule(scores, score_bits, heat_bits, chosen, keys, query, agnostic, rule, share, margin):
    """Mark what a rule takes: of the blocks with a finite score, the best ones, then the hottest."""
    count = min(query, allowance(scores, chosen, rule, share, margin))
    barred = chosen.copy()
    for i in range(barred.size):
        barred[i] |= not np.isfinite(scores[i])
    outside = barred & ~chosen
    if count > 0:
        take_best(score_bits, barred, keys, count)
    left = 0
    for x in barred:
        left += not x
    if min(agnostic, left) > 0:
        take_best(heat_bits, barred, keys, min(agnostic, left))
    for i in range(barred.size):
        chosen[i] = barred[i] and not outside[i]


@nb.njit(cache=True, fastmath=FASTMATH)
def update_heat(scores, heat, decay, softmax):
    """heat = decay * heat + normalised scores, where scores are finite."""
    top, total = np.float32(0.0), np.float32(0.0)
    if softmax:
        top = np.float32(-np.inf)
        for x in scores:
            if np.isfinite(x):
                top = max(top, x)
    for x in scores:
        if np.isfinite(x):
            total += np.exp(x - top) if softmax else x
    inverse = np.float32(1.0) / total if total != 0.0 else np.float32(1.0)
    for i in range(scores.size):
        heat[i] *= decay
        if np.isfinite(scores[i]):
            heat[i] += (np.exp(scores[i] - top) if softmax else scores[i]) * inverse


# One (row, head) an iteration. scores and heat: [B, Hkv, N] as float32, and the same memory as int32 bits.
@nb.njit(cache=True, parallel=True)
def select_kernel(
    scores, score_bits, heat, heat_bits, seq_lens, selected, num_selected, block_size, sink, recent, query,
    agnostic, decay, mode, rule, share, margin, due,
):  # fmt: skip
    num_rows, num_kv_heads, width = selected.shape
    for i in nb.prange(num_rows * num_kv_heads):
        b, h = i // num_kv_heads, i % num_kv_heads
        if due.size > 0 and due[b] == 0 and seq_lens[b] > 0:
            continue
        blocks = (seq_lens[b] + block_size - 1) // block_size
        out = selected[b, h]
        if rule == FIXED and blocks <= width:
            count = blocks
            for s in range(count):
                out[s] = s
        else:
            chosen = np.zeros(blocks, np.bool_)
            chosen[:sink] = True
            chosen[max(blocks - recent, 0) :] = True
            keys = np.empty(blocks, np.int32)
            if rule != FIXED:
                take_by_rule(
                    scores[b, h, :blocks], score_bits[b, h], heat_bits[b, h] if agnostic > 0 else score_bits[b, h],
                    chosen, keys, query, agnostic, rule, share, margin,
                )  # fmt: skip
            elif query > 0:
                take_best(score_bits[b, h], chosen, keys, query)
            if rule == FIXED and agnostic > 0:
                take_best(heat_bits[b, h], chosen, keys, agnostic)
            count = 0
            for n in range(blocks):
                if chosen[n]:
                    out[count] = n
                    count += 1
        out[count:] = -1
        num_selected[b, h] = count
        if mode > 0:
            update_heat(scores[b, h, :blocks], heat[b, h, :blocks], decay, mode == 2)


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

    Arguments as in `csrc_free_kernels/reference/select.py`.

    Raises:
        ValueError: as the reference.
    """
    check_arguments(block_scores, heat, query_blocks, agnostic_blocks, normalise, rule, limit)
    scores = NOTHING if block_scores is None else block_scores.numpy()
    heats = NOTHING if heat is None else heat.numpy()
    select_kernel(
        scores, scores.view(np.int32), heats, heats.view(np.int32), seq_lens.numpy(), selected_blocks.numpy(),
        num_selected.numpy(), block_size, sink_blocks, recent_blocks, query_blocks, agnostic_blocks,
        np.float32(heat_decay), MODES[normalise], RULES.index(rule),
        np.int64(limit_of(rule, limit) if rule in ("threshold", "mass") else 0), np.float32(limit),
        NO_ROWS if due is None else due.numpy(),
    )  # fmt: skip
