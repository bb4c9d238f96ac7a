"""The prefetch policies that compete with plain LRU, as guesses made from a recording and its scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.prefetch import Geometry, Phase, belady
from bench.recorded import Recording
from csrc_free_kernels.reference.select import select

__all__ = [
    "POLICIES",
    "Guesses",
    "earlier_layer",
    "geometry_of",
    "phases_of",
    "query_blocks",
    "select_by",
    "worth_of",
]

POLICIES = {
    "lru": "what the runtime does: nothing is fetched ahead",
    "belady": "evicts what is needed last; nobody moves fewer blocks (a bound, not a policy)",
    "evict-coldest": "evicts the block with the least heat",
    "evict-lowest": "evicts the block with the lowest score for the query",
    "perfect": "knows the selection one layer early, evicts as lru (a bound)",
    "agnostic": "the hottest blocks of the next step, certain once a step is done",
    "agnostic-wide": "every block that the next step could choose for its heat",
    "runner-up-1": "the best unselected absent block of the last query, one a step",
    "runner-up-4": "four a step",
    "hottest-1": "the hottest unselected absent block, one a step",
    "ahead-1": "the selection for a query guessed one layer ahead",
    "ahead-1-half": "the better half of its query-aware blocks only",
    "ahead-1-limit-1": "its best absent query-aware block, one a step",
    "ahead-2": "the selection for a query guessed two layers ahead",
    "ahead-6": "the same, one full-attention layer of this model ahead",
    "previous-layer": "what the full-attention layer before selected in this step",
    "runner-up-1+ahead-1": "both: one a step early, the others a layer early",
    "evict-lowest+ahead-1-half": "both",
}


def geometry_of(recording: Recording) -> Geometry:
    """Return what the victim rule must know of a recording."""
    meta = recording.meta
    return Geometry(
        block_size=meta["block_size"],
        sink_blocks=meta["sink_blocks"],
        recent_blocks=meta["recent_blocks"],
        start_tokens=meta["start_tokens"],
    )


def select_by(
    recording: Recording,
    ranking: NDArray[np.float32],
    scores: NDArray[np.float32],
    start_heat: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Select every step by `ranking`, with the heat that the true scores leave behind.

    Args:
        recording: its split of the budget.
        ranking: [streams, steps, N] block scores to choose by.
        scores: [streams, steps, N] the true ones.
        start_heat: [streams, N] after the prompt.

    Returns:
        [streams, steps, S] ids; the recording's own when `ranking` is `scores`.
    """
    meta, (streams, steps, _) = recording.meta, scores.shape
    shares = {key: meta[key] for key in ("block_size", "sink_blocks", "recent_blocks", "query_blocks")}
    shares |= {"agnostic_blocks": meta["agnostic_blocks"], "heat_decay": meta["heat_decay"]}
    heat = torch.from_numpy(start_heat.copy())[None]
    chosen = torch.empty(1, streams, recording.block_budget, dtype=torch.int32)
    count, found = torch.empty(1, streams, dtype=torch.int32), np.empty(recording.base.shape, dtype=np.int64)
    for t in range(steps):
        seq_lens = torch.tensor([meta["start_tokens"] + t + 1], dtype=torch.int32)
        guessed, true = (torch.from_numpy(part[:, t].copy())[None] for part in (ranking, scores))
        select(guessed, heat, seq_lens, chosen, count, normalise="none", **shares)
        found[:, t] = chosen[0].numpy()
        select(true, heat, seq_lens, chosen, count, normalise="sum", **shares)
    return found


def query_blocks(recording: Recording, scores: NDArray[np.float32]) -> list[NDArray[np.int64]]:
    """Return per step the blocks of one stream that were chosen for their score, given its scores [steps, N]."""
    ranked = _ranked(scores[None], geometry_of(recording))[0]
    return [ids[: recording.meta["query_blocks"]] for ids in ranked]


def step_old(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the scores of the step before; the first step has its own."""
    return np.concatenate([scores[:, :1], scores[:, :-1]], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """Everything the policies guess from. Arrays are [streams, steps, ...]."""

    runners: list[list[NDArray[np.int64]]]
    """Per stream and step: the blocks that are not forced, best score of the step before first."""
    hottest: list[list[NDArray[np.int64]]]
    """The same by heat."""
    ahead: dict[int, NDArray[np.int64]]
    """Layers ahead -> ids [streams, steps, S] selected for the guessed query."""
    ahead_best: list[list[NDArray[np.int64]]]
    """As `runners`, by the scores of the query guessed one layer ahead."""
    worth: dict[str, NDArray[np.float32]]
    """Policy -> [streams, steps, N], what it keeps after every step: heat or score."""
    step_old: NDArray[np.int64]
    """Ids [streams, steps, S] selected for the query of the step before."""

    @classmethod
    def of(cls, recording: Recording, scores: Mapping[str, NDArray[np.float32]]) -> "Guesses":
        """Prepare the guesses.

        Args:
            recording: the ids.
            scores: the arrays that `bench record --scores` wrote for it.

        Raises:
            ValueError: the scores do not lead to the recorded ids.
        """
        true, heat = scores["scores"], scores["start_heat"]
        if not np.array_equal(select_by(recording, true, true, heat), recording.base):
            raise ValueError("these scores belong to another recording: selecting by them gives other ids")
        ahead = {
            int(name.removeprefix("ahead")): select_by(recording, scores[name], true, heat)
            for name in scores
            if name.startswith("ahead")
        }
        hot = _heats(true, heat, recording.meta["heat_decay"])
        before, after, geometry = hot[:, :-1], hot[:, 1:], geometry_of(recording)
        old = step_old(true)
        return cls(
            runners=_ranked(old, geometry),
            hottest=_ranked(before, geometry),
            ahead=ahead,
            ahead_best=_ranked(scores["ahead1"], geometry),
            worth={"evict-coldest": after, "evict-lowest": true},
            step_old=select_by(recording, old, true, heat),
        )


def _heats(scores: NDArray[np.float32], start_heat: NDArray[np.float32], decay: float) -> NDArray[np.float32]:
    """Return the heat ahead of every step and after the last one, [streams, steps + 1, N]."""
    share = np.where(np.isfinite(scores), scores, 0.0)
    share /= share.sum(-1, keepdims=True)
    heats = [start_heat]
    for t in range(scores.shape[1]):
        heats.append((decay * heats[-1] + share[:, t]).astype(np.float32))
    return np.stack(heats, axis=1)


def _ranked(values: NDArray[np.float32], geometry: Geometry) -> list[list[NDArray[np.int64]]]:
    """Return per stream and step the blocks that are not forced, largest value first, ties to the lower id."""
    order = np.argsort(-values, axis=-1, kind="stable")
    ranked = []
    for stream in order:
        last = [geometry.tail(t) - geometry.recent_blocks for t in range(len(stream))]
        ranked.append(
            [ids[(ids >= geometry.sink_blocks) & (ids <= n)] for ids, n in zip(stream, last, strict=True)]
        )
    return ranked


def phases_of(policy: str, stream: int, recording: Recording, guesses: Guesses | None) -> list[Phase] | None:
    """Return what a policy fetches ahead in one stream; None when the recording cannot tell.

    Raises:
        ValueError: an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    ahead = [
        part for part in policy.split("+") if part not in ("lru", "belady", "evict-coldest", "evict-lowest")
    ]
    phases = [_phase(part, stream, recording, guesses) for part in ahead]
    known = [phase for phase in phases if phase is not None]
    return known if len(known) == len(phases) else None


def worth_of(policy: str, stream: int, recording: Recording, guesses: Guesses | None) -> NDArray[Any] | None:
    """Return what a policy keeps, [steps, N] after every step; None: what was used last.

    Raises:
        ValueError: it needs guesses.
    """
    name = policy.split("+")[0]
    if name == "belady":
        return belady(recording.base[stream], recording.context_blocks)
    if not name.startswith("evict"):
        return None
    if guesses is None:
        raise ValueError(f"{name} needs the scores of the recording")
    return guesses.worth[name][stream]


def _phase(part: str, stream: int, recording: Recording, guesses: Guesses | None) -> Phase | None:
    query, agnostic = recording.meta["query_blocks"], recording.meta["agnostic_blocks"]
    if part == "perfect":
        return Phase(wanted=list(recording.base[stream].astype(np.int64)), window="layer")
    if part == "previous-layer":
        return Phase(wanted=_layer_before(recording, stream), window="layer")
    if part == "agnostic":
        return Phase(wanted=list(recording.early[stream].astype(np.int64))) if agnostic else None
    if guesses is None:
        return None
    if part == "agnostic-wide":
        wide = [ids[: query + agnostic] for ids in guesses.hottest[stream]]
        return Phase(wanted=wide) if agnostic else None
    if part == "ahead-1-half":
        return Phase(wanted=[ids[: query // 2] for ids in guesses.ahead_best[stream]], window="layer")
    name, _, number = part.rpartition("-")
    if name == "ahead-1-limit":
        best = [ids[:query] for ids in guesses.ahead_best[stream]]
        return Phase(wanted=best, limit=int(number), window="layer")
    if name == "ahead":
        found = guesses.ahead.get(int(number))
        return None if found is None else Phase(wanted=list(found[stream]), window="layer")
    ranked = guesses.runners if name == "runner-up" else guesses.hottest
    return Phase(wanted=ranked[stream], limit=int(number))


def earlier_layer(recording: Recording, stream: int) -> int | None:
    """Return the stream of the same text and head one full-attention layer earlier; None in the first layer."""
    text, layer, head = recording.meta["streams"][stream]
    found = [
        (other, s)
        for s, (name, other, h) in enumerate(recording.meta["streams"])
        if (name, h) == (text, head) and other < layer
    ]
    return max(found)[1] if found else None


def _layer_before(recording: Recording, stream: int) -> list[NDArray[np.int64]]:
    earlier = earlier_layer(recording, stream)
    if earlier is None:
        return [np.empty(0, dtype=np.int64)] * recording.recorded_steps
    return list(recording.base[earlier].astype(np.int64))
