"""Triton `decide`: score, select and resolve in one launch.

The programs of a (row, head) share its summaries; the last of them to finish pools, selects and resolves, in
registers as far as they hold a row. With `open_groups` they see a shorter row: its candidates, the blocks of the open
groups, ascending. As the row's end is among them, a row of as many tokens as its open groups hold is selected from
like any other; only addresses and ids go through the list of groups.
"""

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from csrc_free_kernels.gpu.resolve import resolve_blocks, tile_of_slots
from csrc_free_kernels.gpu.score_mean import arrive, block_at, pool_mean, pool_mean_at_once, unit_logits
from csrc_free_kernels.gpu.score_minmax import bounds
from csrc_free_kernels.gpu.score_windows import pool_windows
from csrc_free_kernels.gpu.select import MAX_BLOCKS, MAX_WARPS, fold_heat, select_blocks, warps_of
from csrc_free_kernels.gpu.victims import id_range_of
from csrc_free_kernels.launch import launch_of
from csrc_free_kernels.reference.decide import check_groups, check_score
from csrc_free_kernels.reference.score_minmax import check_minmax
from csrc_free_kernels.reference.select import check_arguments, limit_of

LOGITS_PER_THREAD = 32  # that pooling holds at once
TILE_BYTES = 32768  # of summaries that a program scores at once, less where a small batch is split further
PROGRAMS = 528  # worth launching, four an SM


# Writes the scores of one (row, head) where its logits are complete, and returns them [N_P].
@triton.jit
def pool_scores(
    logits, o_logits, p_scores, seq_len, num_blocks, block_size, stride_lh,
    SCORE: tl.constexpr, G: tl.constexpr, G_P: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
    N_P: tl.constexpr,
):  # fmt: skip
    num_closed = tl.minimum(seq_len // block_size, num_blocks)
    if SCORE == "mean" and TILE == N_P:
        b_score = pool_mean_at_once(
            logits + o_logits, p_scores, num_closed, num_blocks, stride_lh, G, G_P, N_P
        )
    else:
        if SCORE == "mean":
            pool_mean(logits + o_logits, p_scores, num_closed, num_blocks, stride_lh, G, G_P, TILE)
            tl.debug_barrier()  # what other threads of this program wrote is read next
        if SCORE == "windows":
            num_units = tl.minimum(seq_len // (block_size // W), num_blocks * W)
            pool_windows(logits + o_logits, p_scores, num_units, num_blocks, stride_lh, G, G_P, W, TILE)
            tl.debug_barrier()
        o_n = tl.arange(0, N_P)
        b_score = tl.load(p_scores + o_n, mask=o_n < num_blocks, other=float("-inf"))
    return b_score


# Grid (B * Hkv, splits). Shapes as in the contract; N_P and S_P are N and S rounded up to powers of two, TILE
# summaries are scored at once, POOL_TILE pooled, SLOTS looked at for victims.
@triton.jit
def decide_kernel(
    q, summary, heat, seq_lens, due, host_table, slot_of, block_in, last_used, slot_base, slot_count, step,
    logits, arrivals, block_scores, selected_blocks, num_selected, hit_slots, miss_slots,
    load_src, load_dst, load_at, load_count, counters, open_groups, num_open,
    softmax_scale, heat_decay, limit, num_blocks, num_pages, block_size, Hkv, id_range,
    stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_lb, stride_lh,
    stride_bb, stride_bh, stride_hb, stride_hh, stride_ob, stride_oh,
    SCORE: tl.constexpr, NORMALISE: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    QUERY: tl.constexpr, AGNOSTIC: tl.constexpr, RULE: tl.constexpr, DUE: tl.constexpr,
    G: tl.constexpr, G_P: tl.constexpr, G_POOL: tl.constexpr,
    D: tl.constexpr, D_P: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, POOL_TILE: tl.constexpr,
    S: tl.constexpr, S_P: tl.constexpr, N_P: tl.constexpr, SLOTS: tl.constexpr, UPCAST_DOT: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = (tl.program_id(0) // Hkv).to(tl.int64), (tl.program_id(0) % Hkv).to(tl.int64)
    seq_len, i_step = tl.load(seq_lens + i_b), tl.load(step)
    p_slot_of = slot_of + i_b * stride_ob + i_h * stride_oh
    p_groups, open_len = host_table, seq_len
    if R > 1:  # every group that is not open is whole
        p_groups = open_groups + i_row * K
        span = block_size * R
        open_len -= tl.maximum((seq_len + span - 1) // span - tl.load(num_open + i_row), 0) * span
    is_due = True
    scored_len = open_len  # a row that is not due has nothing to score
    if DUE:
        is_due = (tl.load(due + i_b) != 0) | (seq_len == 0)
        scored_len = tl.where(is_due, open_len, 0)
    is_last = True
    if SCORE == "mean" or SCORE == "windows":
        is_last = unit_logits(
            q, summary, host_table, p_groups, scored_len, logits, arrivals, softmax_scale, num_blocks * W,
            num_pages, block_size // W, p_slot_of, i_b, i_h, stride_qb, stride_qh, stride_sp, stride_sh, stride_sw,
            stride_tb, stride_lb, stride_lh, G, G_P, D, D_P, W, R, TILE, UPCAST_DOT,
        )  # fmt: skip
    elif SCORE == "minmax":
        bounds(
            q, summary, host_table, scored_len, block_scores, softmax_scale, num_blocks, block_size, i_b, i_h,
            stride_qb, stride_qh, stride_sp, stride_sh, stride_sw, stride_tb, stride_bb, stride_bh,
            G, G_P, D, D_P, W, TILE, False, UPCAST_DOT,
        )  # fmt: skip
        is_last = arrive(arrivals + i_row)
    if is_last:
        # a row that is not due has no candidates: its list of open groups may be stale
        nb, num_candidates = (
            (seq_len + block_size - 1) // block_size,
            (scored_len + block_size - 1) // block_size,
        )
        o_n = tl.arange(0, N_P)
        b_heat, b_score = tl.zeros([N_P], tl.float32), tl.zeros([N_P], tl.float32)
        if (AGNOSTIC > 0) | (NORMALISE != "none"):
            b_id = block_at(p_groups, o_n, o_n < num_candidates, R)
            p_heat = heat + i_b * stride_hb + i_h * stride_hh + b_id
            b_heat = tl.load(p_heat, mask=o_n < num_candidates, other=0.0)
        if SCORE != "none":
            p_scores = block_scores + i_b * stride_bb + i_h * stride_bh
            b_score = pool_scores(
                logits, i_b * stride_lb + i_h * G * stride_lh, p_scores, scored_len, num_blocks, block_size,
                stride_lh, SCORE, G, G_POOL, W, POOL_TILE, N_P,
            )  # fmt: skip
        if NORMALISE != "none" and is_due:  # nothing below reads it: the selection goes by what is held
            fold_heat(p_heat, b_heat, b_score, o_n < num_candidates, heat_decay, NORMALISE)
        p_selected = selected_blocks + i_row * S
        if is_due:
            b_count = select_blocks(
                b_score, b_heat, num_candidates, limit, p_groups, p_selected, num_selected + i_row,
                SINK, RECENT, QUERY, AGNOSTIC, RULE, R, S, S_P, N_P,
            )  # fmt: skip
        else:
            b_count = tl.load(num_selected + i_row)
        tl.debug_barrier()  # the list is read by other threads than wrote it
        o_s = tl.arange(0, S_P)
        b_block = tl.load(p_selected + o_s, mask=o_s < b_count, other=0)
        b_slot = tl.load(p_slot_of + b_block, mask=o_s < b_count, other=-1)
        resolve_blocks(
            b_block, b_slot, b_count, nb, i_step, i_row, host_table + i_b * stride_tb, p_slot_of, block_in,
            last_used, slot_base + i_row, slot_count + i_row, hit_slots + i_row * S, miss_slots + i_row * S,
            load_src, load_dst, load_at, load_count, counters + i_row * 5, SINK, RECENT, id_range, Hkv, S, S_P, SLOTS,
        )  # fmt: skip


def decide(
    q: Tensor | None,
    summary: Tensor | None,
    heat: Tensor | None,
    seq_lens: Tensor,
    host_table: Tensor,
    slot_of: Tensor,
    block_in: Tensor,
    last_used: Tensor,
    slot_base: Tensor,
    slot_count: Tensor,
    step: Tensor,
    logits: Tensor | None,
    arrivals: Tensor | None,
    block_scores: Tensor | None,
    selected_blocks: Tensor,
    num_selected: Tensor,
    hit_slots: Tensor,
    miss_slots: Tensor,
    load_src: Tensor,
    load_dst: Tensor,
    load_at: Tensor,
    load_count: Tensor,
    counters: Tensor,
    *,
    score: Literal["mean", "windows", "minmax", "given", "none"],
    softmax_scale: float,
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
    open_groups: Tensor | None = None,
    num_open: Tensor | None = None,
    group_blocks: int = 1,
) -> None:
    """Score, select and resolve: which blocks this step attends to, where they are, what must be loaded.

    Arguments as in `csrc_free_kernels/reference/decide.py`. The last dim of every tensor is contiguous, and
    the lists, `slot_base`, `slot_count`, `arrivals` and `counters` are contiguous. One launch on the current
    stream, no wait.

    Raises:
        ValueError: an unknown `score` or `normalise`, scores or heat are needed and not given, open groups with
            what ranks otherwise than by mean keys, a strided tensor, or more blocks than a program can hold (32768).
    """
    check_score(score)
    check_arguments(
        None if score == "none" else block_scores, heat, query_blocks, agnostic_blocks, normalise, rule, limit
    )
    rows, heads, num_blocks = slot_of.shape
    num_groups, per_group = 0, 1
    whole = [selected_blocks, num_selected, slot_base, slot_count, hit_slots, miss_slots, counters]
    if open_groups is not None and num_open is not None:
        check_groups(score, rule, block_scores, selected_blocks, open_groups, group_blocks)
        whole += [open_groups, num_open]
        num_groups, per_group = open_groups.shape[2], group_blocks
        num_blocks = num_groups * per_group  # of this launch: the candidates
    given = [t for t in (q, summary, heat, logits, block_scores) if t is not None]
    if not all(t.is_contiguous() for t in whole) or any(
        t.stride(-1) != 1 for t in (*given, slot_of, host_table)
    ):
        raise ValueError("lists and counters must be contiguous, and the last dim of every tensor")
    if num_blocks > MAX_BLOCKS:
        raise ValueError(f"decide handles up to {MAX_BLOCKS} blocks, not {num_blocks}")
    if score in ("given", "none"):
        q = summary = None
    if summary is not None and score == "minmax":
        check_minmax(summary, "max")
    if summary is not None and score == "mean" and summary.shape[2] != 1:
        raise ValueError(f"score 'mean' takes one vector a block, not {summary.shape[2]}")
    width, units = selected_blocks.shape[2], 1 if summary is None else summary.shape[2]
    group, dim = (1, 1) if q is None else (q.shape[1] // heads, q.shape[2])
    padded, pooled, dim_p = (triton.next_power_of_2(n) for n in (num_blocks, group, dim))
    splits, sizes = decide_sizes(score, q, summary, rows * heads, padded, pooled)
    decide_kernel[(rows * heads, splits)](
        q, summary, heat, seq_lens, due, host_table, slot_of, block_in, last_used, slot_base, slot_count, step,
        logits, arrivals, block_scores, selected_blocks, num_selected, hit_slots, miss_slots,
        load_src, load_dst, load_at, load_count, counters, open_groups, num_open,
        softmax_scale, heat_decay, limit_of(rule, limit), num_blocks, slot_of.shape[2], block_size, heads,
        id_range_of(slot_of, block_in),
        *strides_of(q, 2), *strides_of(summary, 3), host_table.stride(0), *strides_of(logits, 2),
        *strides_of(block_scores, 2), *strides_of(heat, 2), *strides_of(slot_of, 2),
        SCORE=score, NORMALISE=normalise, SINK=sink_blocks, RECENT=recent_blocks, QUERY=query_blocks,
        AGNOSTIC=agnostic_blocks, RULE=rule, DUE=due is not None, G=group, G_P=max(16, pooled), G_POOL=pooled,
        D=dim, D_P=dim_p, W=units, S=width, S_P=triton.next_power_of_2(width), N_P=padded,
        SLOTS=tile_of_slots(block_in, rows * heads), R=per_group, K=num_groups,
        UPCAST_DOT=not seq_lens.is_cuda, **sizes,
    )  # fmt: skip


def decide_sizes(
    score: str, q: Tensor | None, summary: Tensor | None, heads: int, padded: int, pooled: int
) -> tuple[int, dict[str, int]]:
    """Programs for each of `heads` (row, head) pairs, and tiles and warps of a launch.

    Args:
        padded, pooled: N and G, rounded up to powers of two.
    """
    use = {"num_warps": warps_of(padded), "programs": PROGRAMS}
    use |= launch_of("decide", q.device, heads, blocks=padded) if q is not None else {}
    warps = use["num_warps"]
    per_thread = LOGITS_PER_THREAD if score == "mean" and warps < MAX_WARPS else LOGITS_PER_THREAD // 4
    sizes = {
        "POOL_TILE": min(padded, max(64, warps * 32 * per_thread // pooled)),
        "num_warps": warps,
        "TILE": 16,
    }
    if q is None or summary is None:
        return 1, sizes
    # minmax takes maxima and minima together, and a block's sub-units one after the other
    vectors, held = (1, 2) if score == "minmax" else (summary.shape[2], 1)
    summary_bytes = held * triton.next_power_of_2(q.shape[2]) * summary.element_size()
    splits = triton.next_power_of_2(triton.cdiv(use["programs"], heads))
    units = triton.next_power_of_2(padded * vectors)
    # 8 summaries a warp are the width of a matrix instruction
    sizes["TILE"] = max(16, min(TILE_BYTES // summary_bytes, max(8 * warps, units // splits)))
    return max(1, min(units // sizes["TILE"], splits)), sizes


def strides_of(t: Tensor | None, dims: int) -> tuple[int, ...]:
    """The first strides of a tensor, zeros for None."""
    return (0,) * dims if t is None else t.stride()[:dims]
