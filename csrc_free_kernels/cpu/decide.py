"""numba `decide`: the three ops one after the other, as a launch costs little here."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from csrc_free_kernels.cpu.candidates import choose_in_groups
from csrc_free_kernels.cpu.resolve import resolve
from csrc_free_kernels.cpu.score_mean import score_mean
from csrc_free_kernels.cpu.score_minmax import score_minmax
from csrc_free_kernels.cpu.score_windows import score_windows
from csrc_free_kernels.cpu.select import select
from csrc_free_kernels.reference.decide import check_groups, check_score

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
    open_groups: Tensor | None = None,
    num_open: Tensor | None = None,
    group_blocks: int = 1,
) -> None:
    """Score, select and resolve: which blocks this step attends to, where they are, what must be loaded.

    Arguments and errors as in `csrc_free_kernels/reference/decide.py`; `arrivals` is not used.
    """
    check_score(score)
    scored_lens = seq_lens if due is None else seq_lens * due
    shares: dict[str, Any] = dict(
        block_size=block_size, sink_blocks=sink_blocks, recent_blocks=recent_blocks, query_blocks=query_blocks,
        agnostic_blocks=agnostic_blocks, heat_decay=heat_decay, normalise=normalise, rule=rule, limit=limit,
    )  # fmt: skip
    if open_groups is not None:
        check_groups(score, rule, block_scores, selected_blocks, open_groups, group_blocks)
        assert q is not None and summary is not None and logits is not None and num_open is not None
        assert block_scores is not None
        choose_in_groups(
            q, summary, heat, scored_lens, host_table, logits, block_scores, selected_blocks, num_selected,
            open_groups, num_open, group_blocks, seq_lens, softmax_scale, shares,
        )  # fmt: skip
    else:
        if score in SCORERS:
            assert q is not None and summary is not None and block_scores is not None
            SCORERS[score](
                q, summary, host_table, scored_lens, logits, arrivals, block_scores,
                softmax_scale=softmax_scale, block_size=block_size,
            )  # fmt: skip
        select(
            None if score == "none" else block_scores, heat, seq_lens, selected_blocks, num_selected,
            **shares, due=due,
        )  # fmt: skip
    resolve(
        selected_blocks, num_selected, seq_lens, host_table, slot_of, block_in, last_used, slot_base,
        slot_count, step, hit_slots, miss_slots, load_src, load_dst, load_at, load_count, counters,
        block_size=block_size, sink_blocks=sink_blocks, recent_blocks=recent_blocks,
    )  # fmt: skip
