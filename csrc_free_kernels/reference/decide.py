"""Truth of `decide`: score, select and resolve, one after the other."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from csrc_free_kernels.reference.resolve import resolve
from csrc_free_kernels.reference.score_mean import score_mean
from csrc_free_kernels.reference.score_minmax import score_minmax
from csrc_free_kernels.reference.score_windows import score_windows
from csrc_free_kernels.reference.select import select

SCORERS: dict[str, Callable[..., None]] = {
    "mean": score_mean,
    "windows": score_windows,
    "minmax": score_minmax,
}


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
) -> None:
    """Score, select and resolve: which blocks this step attends to, where they are, what must be loaded.

    Means exactly what the ops `score_<score>`, `select` and `resolve` mean one after the other.

    Args:
        q: [B, Hq, D] after RoPE; like `summary` not used, and may be None, where `score` is given or none.
        summary: [P, Hkv, W, D] block summaries of the kind that `score` ranks by.
        heat: fp32 [B, Hkv, N], updated in place; None as `select` allows.
        seq_lens: int32 [B], tokens; 0 = inactive.
        host_table: int32 [B, N], logical block -> host page.
        slot_of, block_in, last_used: int32 [B, Hkv, N], [L], [L], updated in place.
        slot_base, slot_count: int32 [B, Hkv]; any number of slots, none included.
        step: int32 [1].
        logits: fp32 [B, Hq, N * W] scratch for mean and windows, else None.
        arrivals: int32 [B, Hkv], zero before and after; for the Triton home where it scores, else None.
        block_scores: fp32 [B, Hkv, N]: written in full by mean, windows and minmax; read for given; None for
            none.
        selected_blocks, num_selected: int32 [B, Hkv, S], [B, Hkv], written in full.
        hit_slots, miss_slots: int32 [B, Hkv, S], written in full.
        load_src, load_dst, load_at, load_count: the load list, int32 [max_loads] thrice, [1], added to.
        counters: int64 [B, Hkv, 5], added to.
        score: how blocks are ranked; `given`: by what the caller put into `block_scores`; `none`: not at all.
        softmax_scale: factor on q.k.
        block_size: tokens in a block.
        sink_blocks, recent_blocks: blocks forced at the start and at the end.
        query_blocks, agnostic_blocks: blocks taken by score, and by heat among what is left.
        heat_decay: factor on the old heat.
        normalise: how scores enter the heat: "sum", "softmax" or "none".
        rule, limit: how many of `query_blocks` are taken, as in `select`.
        due: int32 [B], 0 or 1, as in `select`: rows at 0 are not scored (their `block_scores` become -inf unless
            given) and keep the lists, which are resolved as ever. None: every row is due.

    Raises:
        ValueError: an unknown `score`, or one of the errors of the three ops.
    """
    check_score(score)
    if score in SCORERS:
        assert q is not None and summary is not None and block_scores is not None
        SCORERS[score](
            q, summary, host_table, seq_lens if due is None else seq_lens * due, logits, arrivals, block_scores,
            softmax_scale=softmax_scale, block_size=block_size,
        )  # fmt: skip
    select(
        None if score == "none" else block_scores, heat, seq_lens, selected_blocks, num_selected,
        block_size=block_size, sink_blocks=sink_blocks, recent_blocks=recent_blocks,
        query_blocks=query_blocks, agnostic_blocks=agnostic_blocks, heat_decay=heat_decay,
        normalise=normalise, rule=rule, limit=limit, due=due,
    )  # fmt: skip
    resolve(
        selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base,
        slot_count, step, hit_slots, miss_slots, load_src, load_dst, load_at, load_count, counters,
        block_size=block_size, sink_blocks=sink_blocks, recent_blocks=recent_blocks,
    )  # fmt: skip


def check_score(score: str) -> None:
    """Raise ValueError for a `score` that no op knows."""
    if score not in (*SCORERS, "given", "none"):
        raise ValueError(f"score must be one of {[*SCORERS, 'given', 'none']}, not {score!r}")
