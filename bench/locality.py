"""What the settings of locality are worth on a text: one dense forward is captured, every setting replayed on it.

A step selects with the reference op, by the scores of `locality_streams`; its heat is kept as the runtime keeps it,
and what a pool of some capacity misses is `rheo_offload.trace.replay`'s LRU. Recall is the attention mass inside the
selected blocks. The forward is dense, so the queries are those of exact attention. Weights are known as means over the
query heads of a KV head, so heat from attention takes them as shares of the mean's selected mass, where the runtime
takes each head's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.locality_streams import MEAN_KEY, Ranking, Streams, streams_of
from csrc_free_kernels.reference.select import select
from rheo_offload.calibration.capture import Sample
from rheo_offload.calibration.score import WARM_QUERIES
from rheo_offload.selection.base import normalised
from rheo_offload.selection.mean_key import MeanKey
from rheo_offload.selection.policy import make_policy
from rheo_offload.trace.file import Trace
from rheo_offload.trace.replay import Selected, replay
from rheo_offload.trace.simulate import capacity_slots
from rheo_offload.types import Policy

__all__ = ["Grid", "Heat", "Result", "Walk", "policy_of", "replay_text", "walk"]


@dataclass(frozen=True, slots=True)
class Heat:
    """How a block becomes hot."""

    source: Literal["scores", "attention", "bias"] = "scores"
    """`bias`: it does not, the learned bias of its tokens ranks it (NOSA)."""
    decay: float = 0.98
    """Not read with `bias`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Every combination of these is replayed; heats only where a share makes use of them."""

    ranking: Ranking = MEAN_KEY
    recent_blocks: int | None = None
    """Forced at the end; None: a quarter of the budget, as by default."""
    block_sizes: Sequence[int] = (32, 64)
    """Tokens; each a multiple of what was captured."""
    token_budgets: Sequence[int] = (512, 1024, 2048)
    """Tokens; each is replayed in as many blocks of every size as it holds."""
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75)
    heats: Sequence[Heat] = tuple(
        Heat(s, d)
        for s in ("scores", "attention")
        for d in (0.9, 0.98, 1.0)  # type: ignore[arg-type]
    )
    capacities: Sequence[float] = (1.0, 1.25, 1.5, 2.0)
    """Slots of the pool over the budget."""
    skip: int = 64
    """First steps left out of every figure: the pool right after a prompt is not the pool later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One setting: means over streams and steps."""

    block_size: int
    blocks: int
    share: float
    heat: Heat | None
    """None: nothing is chosen by heat (it still fills the pool before the first step, see `Grid.heats`)."""
    capacity: float
    recall: float
    pointed: float | None
    """Of the unforced blocks with a token that one query head gives more than half of its attention, the share that is
    selected; None: there are none."""
    hit_rate: float
    """The open block left out."""
    hit_rate_unforced: float
    """The same without sink and recent blocks."""
    misses: float
    """Blocks per token, all layers and KV heads."""
    bytes: float
    """Of the misses, per token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Walk:
    """What T steps of S streams selected, for V heats; B blocks a step."""

    ids: NDArray[np.uint16]  # [V, S, T, B], ascending
    recall: NDArray[np.float32]  # [V, S, T]
    pointed: NDArray[np.int64]  # [V, S, T, 2]: of the blocks that are pointed at, those selected, and all
    start_heat: Tensor  # [V, S, prompt blocks]


def replay_text(samples: Mapping[int, Sample], grid: Grid, *, itemsize: int) -> Iterator[Result]:
    """Replay every setting of a grid on one captured window.

    Raises:
        ValueError: the prompt is too short for a pool of the grid, or no step is left to count.
    """
    for block_size in grid.block_sizes:
        streams = streams_of(samples, grid.ranking, block_size=block_size, itemsize=itemsize)
        _check(streams, grid)
        for tokens in grid.token_budgets:
            seen = set()
            for share in grid.shares:
                policy = policy_of(tokens // block_size, share, grid.recent_blocks)
                if policy.agnostic_blocks in seen:  # as many blocks as an earlier share gives
                    continue
                seen.add(policy.agnostic_blocks)
                heats = grid.heats if policy.agnostic_blocks else grid.heats[:1]
                found = walk(streams, policy, heats)
                for v, heat in enumerate(heats):
                    for ratio in grid.capacities:
                        yield _result(streams, found, v, policy, share, heat, ratio, grid.skip)


def policy_of(blocks: int, share: float, recent: int | None = None) -> Policy:
    """Return the split of a budget that the runtime makes by default; the decay is a heat's own."""
    return make_policy(
        selector=MeanKey(), block_budget=blocks, sink_blocks=1, recent_blocks=blocks // 4 if recent is None else recent,
        query_agnostic_share=share, heat_decay=1.0,
    )  # fmt: skip


def _check(streams: Streams, grid: Grid) -> None:
    largest = capacity_slots(max(grid.token_budgets) // streams.block_size, max(grid.capacities))
    if streams.prompt_blocks < largest:
        raise ValueError(
            f"the prompt has {streams.prompt_blocks} blocks of {streams.block_size}, and the largest pool {largest} "
            "slots: nothing would be missed; take a longer prompt or smaller budgets"
        )
    steps = len(streams.positions) - WARM_QUERIES
    if not 0 <= grid.skip < steps:
        raise ValueError(f"leaving out {grid.skip} steps leaves nothing of {steps}")


def walk(streams: Streams, policy: Policy, heats: Sequence[Heat]) -> Walk:
    """Select at every step, once per way of keeping the heat. `policy.heat_decay` is not read."""
    decay = torch.tensor([heat.decay for heat in heats])
    attention, learned = (
        torch.tensor([heat.source == source for heat in heats])[:, None, None]
        for source in ("attention", "bias")
    )
    shares = normalised(streams.scores, "sum")
    age = torch.arange(WARM_QUERIES - 1, -1, -1)
    heat = torch.where(
        attention,
        torch.einsum("tsn,vt->vsn", streams.mass[:WARM_QUERIES], decay[:, None] ** age),
        streams.start_shares,
    ).contiguous()
    start_heat = _ranked(heat, streams, learned, WARM_QUERIES - 1)[..., : streams.prompt_blocks]
    rows = heat.shape[:2]
    selected = torch.empty(*rows, policy.block_budget, dtype=torch.int32)
    count = torch.empty(rows, dtype=torch.int32)
    ids, recalls, pointed = [], [], []
    for t in range(WARM_QUERIES, len(streams.positions)):
        select(
            streams.scores[t].expand_as(heat), _ranked(heat, streams, learned, t),
            (streams.positions[t] + 1).int().expand(rows[0]), selected, count,
            block_size=streams.block_size, sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks,
            query_blocks=policy.query_blocks, agnostic_blocks=policy.agnostic_blocks, heat_decay=1.0, normalise="none",
        )  # fmt: skip
        mass = streams.mass[t].expand_as(heat)
        inside = torch.zeros_like(heat).scatter_(2, selected.long(), 1.0) * mass
        caught = inside.sum(-1, keepdim=True)
        recalls.append((caught / mass.sum(-1, keepdim=True))[..., 0].numpy())
        strong = streams.strong[t] & _open_to_choice(streams, policy, t)
        pointed.append(
            torch.stack(((strong & (inside > 0)).sum(-1), strong.sum(-1).expand(rows)), -1).numpy()
        )
        ids.append(selected.numpy().astype(np.uint16))
        # A sparse step knows only the weights over what it read, which sum to one; unread blocks keep their score.
        read = attention & (inside > 0)
        heat = decay[:, None, None] * heat + torch.where(read, inside / caught, shares[t])
    return Walk(
        ids=np.stack(ids, 2), recall=np.stack(recalls, 2), pointed=np.stack(pointed, 2), start_heat=start_heat
    )


def _ranked(heat: Tensor, streams: Streams, learned: Tensor, t: int) -> Tensor:
    """Return what ranks blocks whatever the query at one step: their heat, or their bias."""
    return heat if streams.bias is None else torch.where(learned, streams.bias[t], heat)


def _open_to_choice(streams: Streams, policy: Policy, t: int) -> Tensor:
    """Return which blocks are not forced at one step, bool [N]."""
    tail = int(streams.positions[t]) // streams.block_size
    block = torch.arange(streams.mass.shape[2])
    return (block >= policy.sink_blocks) & (block <= tail - policy.recent_blocks)


def _result(
    streams: Streams, found: Walk, v: int, policy: Policy, share: float, heat: Heat, ratio: float, skip: int
) -> Result:
    """Play one heat's selections against pools of one capacity."""
    trace = _trace(streams, found, v, policy, capacity_slots(policy.block_budget, ratio))
    played, selected = replay(trace, "lru"), Selected.of(trace)
    misses = float(played.demand[..., skip:].sum(2).mean())
    found_pointed, all_pointed = found.pointed[v, :, skip:].sum((0, 1)).tolist()
    return Result(
        block_size=streams.block_size,
        blocks=policy.block_budget,
        share=share,
        heat=heat if policy.agnostic_blocks else None,
        capacity=ratio,
        recall=float(found.recall[v, :, skip:].mean()),
        pointed=found_pointed / all_pointed if all_pointed else None,
        hit_rate=played.hit_rate(selected, skip),
        hit_rate_unforced=played.hit_rate_unforced(selected, skip),
        misses=misses,
        bytes=misses * streams.block_bytes,
    )


def _trace(streams: Streams, found: Walk, v: int, policy: Policy, capacity: int) -> Trace:
    """Return the selections as a trace: one layer, one row, streams as heads.

    The pool starts as the runtime warms it: sink, recent and hottest blocks, one slot left for the open block.
    """
    heat = found.start_heat[v]
    worth = heat.clone()
    worth[:, : policy.sink_blocks] = worth[:, worth.shape[1] - policy.recent_blocks :] = torch.inf
    kept = worth.sort(dim=-1, descending=True, stable=True).indices[:, : capacity - 1]
    used = torch.zeros(heat.shape, dtype=torch.int32).scatter_(1, kept, 1)
    order = heat.sort(dim=-1, descending=True, stable=True).indices
    ids = found.ids[None, None, v]
    lens = (streams.positions[WARM_QUERIES:, None] + 1).int().numpy()
    return Trace(
        ids=ids,
        lens=lens,
        misses=np.zeros(ids.shape[:4], dtype=np.uint16),  # no run, a replay
        start_used=used.numpy().astype(np.uint16)[None, None],
        start_order=order.numpy().astype(np.uint16)[None, None],
        meta={
            "block_size": streams.block_size, "block_budget": policy.block_budget, "sink_blocks": policy.sink_blocks,
            "recent_blocks": policy.recent_blocks, "query_blocks": policy.query_blocks,
            "agnostic_blocks": policy.agnostic_blocks, "heat_decay": policy.heat_decay, "capacity": capacity,
            "block_bytes": streams.block_bytes, "layers": [0], "model": "", "config_hash": "",
        },
    )  # fmt: skip
