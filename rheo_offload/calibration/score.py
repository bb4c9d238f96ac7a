"""What a ranking of blocks is worth: decode steps replayed over a window's own attention, over a pool with LRU.

A step selects as the runtime does: sink and recent blocks, the best for the query, then the best whatever the query.
Recall is the attention mass of what was selected (over the mass on all whole blocks); a hit is a selected block that
was resident, the open block left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rheo_offload.calibration.capture import Sample
from rheo_offload.calibration.fit import EvictionHead, GateHead

HEAT_DECAY = 0.98
WARM_QUERIES = 64  # that start the heat, as a prompt's last ones do


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Blocks a step attends to."""

    blocks: int
    sink: int
    recent: int
    share: float
    """Of the blocks left after sink and recent, those chosen whatever the query."""
    capacity_ratio: float = 1.5


@dataclass(frozen=True, slots=True)
class Score:
    """Means over heads, steps and layers."""

    recall: float
    hit_rate: float


def replay(sample: Sample, budget: Budget, scores: Tensor, agnostic: Tensor | None) -> Score:
    """Select at every query of a sample after the first `WARM_QUERIES`, one step each.

    Args:
        sample: its queries are consecutive positions.
        budget: of a step.
        scores: [T, Hkv, N], non-negative, for the query; blocks that are not closed are left out here.
        agnostic: [Hkv, N], the fixed ranking whatever the query; None: heat, from `scores`.
    """
    closed = sample.closed()[:, None]
    scores = scores.masked_fill(~closed, 0.0)
    heat = scores[:WARM_QUERIES].mean(0)
    capacity = max(budget.blocks + 1, round(budget.blocks * budget.capacity_ratio))
    last_used = torch.full(scores.shape[1:], -1.0)
    recalls, hits = [], []
    for t in range(WARM_QUERIES, len(scores)):
        total = int(sample.positions[t]) // sample.block_size + 1
        ranking = heat if agnostic is None else agnostic
        chosen = _select(scores[t], ranking, total, budget)
        inside = chosen & closed[t]
        mass = sample.mass[t]
        recalls.append(((mass * chosen).sum(-1) / mass.sum(-1)).mean())
        if t > WARM_QUERIES:  # the first step fills the pool
            hits.append((_resident(last_used, capacity) & inside).sum() / inside.sum())
        last_used = torch.where(chosen, float(t), last_used)
        heat = HEAT_DECAY * heat + scores[t] / scores[t].sum(-1, keepdim=True).clamp_min(1e-30)
    return Score(float(torch.stack(recalls).mean()), float(torch.stack(hits).mean()))


def mean_key_scores(sample: Sample) -> Tensor:
    """Return the scores [T, Hkv, N] of method `mean_key`."""
    logits = torch.einsum("hgtd,nhd->thgn", sample.q, sample.mean_keys) * sample.softmax_scale
    return logits.masked_fill(~sample.closed()[:, None, None], -torch.inf).softmax(-1).mean(2)


@torch.no_grad()
def compare(
    samples: Mapping[int, Sample],
    budget: Budget,
    *,
    eviction: Mapping[int, EvictionHead],
    gate: Mapping[int, GateHead],
    shares: Sequence[float] = (0.5,),
) -> list[tuple[str, str, float, Score]]:
    """Replay every layer's window under the training-free rankings and the fitted ones.

    Returns:
        Rows (query score, ranking whatever the query, its share, score), means over the layers. `oracle` knows the
        attention mass of the query.
    """
    kinds: dict[str, Callable[[int, Sample], Tensor]] = {
        "oracle": lambda i, s: s.mass,
        "mean_key": lambda i, s: mean_key_scores(s),
    }
    if gate:
        kinds["gate"] = lambda i, s: gate[i].logits(s, torch.arange(len(s.positions))).softmax(-1)
    rows = []
    for name, scores in kinds.items():
        rankings = (
            ["none"] if name == "oracle" else ["none", "heat", *(["eviction head"] if eviction else [])]
        )
        for ranking in rankings:
            for share in [0.0] if ranking == "none" else shares:
                part = Budget(
                    blocks=budget.blocks, sink=budget.sink, recent=budget.recent, share=share,
                    capacity_ratio=budget.capacity_ratio,
                )  # fmt: skip
                found = [
                    replay(s, part, scores(i, s), eviction[i].importance(s) if "head" in ranking else None)
                    for i, s in samples.items()
                ]
                mean = Score(
                    sum(f.recall for f in found) / len(found), sum(f.hit_rate for f in found) / len(found)
                )
                rows.append((name, ranking, share, mean))
    return rows


def _select(scores: Tensor, ranking: Tensor, total: int, budget: Budget) -> Tensor:
    """Return the selected blocks of a step, bool [Hkv, N], with `total` blocks in the row (the open one included)."""
    blocks = torch.arange(scores.shape[1])
    exists = blocks < total
    if total <= budget.blocks:
        return exists.expand_as(scores)
    chosen = ((blocks < budget.sink) | (blocks >= total - budget.recent)) & exists
    rest = budget.blocks - budget.sink - budget.recent
    agnostic = round(rest * budget.share)
    chosen = chosen.expand_as(scores)
    for values, count in ((scores, rest - agnostic), (ranking, agnostic)):
        free = values.masked_fill(chosen | ~exists, -torch.inf)
        best = torch.zeros_like(chosen).scatter(1, free.topk(count, -1).indices, True)
        chosen = chosen | best
    return chosen


def _resident(last_used: Tensor, capacity: int) -> Tensor:
    """Return which blocks the pool of a head holds: those used last, bool [Hkv, N]."""
    kept = last_used.topk(min(capacity, last_used.shape[1]), -1).indices
    return torch.zeros_like(last_used, dtype=torch.bool).scatter(1, kept, True) & (last_used >= 0)
