"""The kernels suite: every op of a decode step, timed in a captured graph of 32 layers.

The layers take turns among states that together exceed the L2 cache, as those of a model do.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from bench.schema import Row
from bench.timing import Quantiles, Rates, measure_rates, synchronise, time_calls
from csrc_free_kernels import launch
from rheo_offload.config import SelectionConfig
from rheo_offload.ops import kernels_for
from rheo_offload.selection.index import Groups, Index, groups_to_open
from rheo_offload.types import Policy

LAYERS = 32
STATE_BYTES = 200 * 2**20  # of states a graph visits at least: four times the L2 cache of an H100
REPLAYS = 20
STEPS_BETWEEN = 4  # of a settling step, between two times that its load list is emptied
SETTLING_ROUNDS = 80  # of those: 0.9 ** 320 leaves nothing of the heat that a layer began with
BUDGET_TOKENS, CAPACITY_TOKENS = 4096, 6144
QUICK_SHAPE = {"heads": 2, "group": 2, "dim": 32, "block_size": 16, "budget": 4, "capacity": 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a step's kernels see of a model and its policy: Llama-3.1-8B with 4096 tokens of budget."""

    rows: int
    blocks: int
    heads: int = 8
    group: int = 4
    dim: int = 128
    block_size: int = 64
    budget: int = 64
    capacity: int = 96
    dtype: torch.dtype = torch.bfloat16

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block of one head."""
        return 2 * self.block_size * self.dim * self.dtype.itemsize

    @property
    def attended_bytes(self) -> int:
        """Bytes of keys and values that one layer of a step attends to."""
        return self.rows * self.heads * min(self.budget, self.blocks) * self.block_bytes

    @property
    def scored_bytes(self) -> int:
        """Bytes of summaries that one layer of a step scores (one mean a block)."""
        return self.rows * self.heads * self.blocks * self.dim * self.dtype.itemsize


class Layer:
    """Tables, pool and summaries of one layer, every selected block resident after the first step."""

    def __init__(self, s: Shape, device: torch.device, page_table: Tensor) -> None:
        def ints(*shape: int, fill: int = -1) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        pairs = s.rows * s.heads
        slots = 1 + pairs * s.capacity
        self.pool = torch.randn(slots, 2 * s.block_size * s.dim, device=device, dtype=s.dtype)
        self.k_pool, self.v_pool = self.pool.view(slots, 2, s.block_size, s.dim).unbind(1)
        self.summary = torch.randn(int(page_table.max()) + 1, s.heads, 1, s.dim, device=device, dtype=s.dtype)
        self.value_summary = self.summary.flip(0)
        # far apart beside the scores that are added, so that the selection stays the same from step to step
        self.heat = 1000 * torch.rand(s.rows, s.heads, s.blocks, device=device)
        self.slot_of, self.block_in, self.last_used = (
            ints(s.rows, s.heads, s.blocks),
            ints(slots),
            ints(slots, fill=0),
        )
        self.base = 1 + s.capacity * torch.arange(pairs, dtype=torch.int32, device=device).view(
            s.rows, s.heads
        )
        self.count = torch.full_like(self.base, s.capacity)
        self.counters = torch.zeros(s.rows, s.heads, 5, dtype=torch.int64, device=device)
        tail = torch.arange(s.rows, device=device)
        self.slot_of[tail, :, -1] = self.base
        self.block_in[self.base.long()] = s.blocks - 1

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Residency tables in the order of the ops' arguments."""
        return self.slot_of, self.block_in, self.last_used, self.base, self.count


class Opened:
    """What the index of two levels adds: bounds of a layer's groups, and the lists and scratch of a step."""

    def __init__(self, s: Shape, groups: Groups, layers: int, device: torch.device) -> None:
        self.groups, size = groups, groups.group_blocks
        num_groups, pairs = -(-s.blocks // size), (s.rows, s.heads)
        shape = (layers, *pairs, num_groups, 2, s.dim)
        self.bounds = torch.randn(shape, device=device, dtype=s.dtype).sort(4, descending=True).values
        self.scores = torch.zeros(*pairs, 2, num_groups, device=device)
        self.lists, self.count = (
            torch.zeros(*shape, dtype=torch.int32, device=device)
            for shape in ((*pairs, groups.listed), pairs)
        )
        self.logits = torch.zeros(s.rows, s.heads * s.group, groups.candidates, device=device)
        self.block_scores = torch.zeros(*pairs, groups.candidates, device=device)


class Step:
    """The ops of one layer's decode step over layers in turn, and their scratch."""

    def __init__(self, s: Shape, device: torch.device, count: int | None = None) -> None:
        """Args: count: layers that take turns; by default enough to keep the L2 cache out of it."""
        self.shape, self.device, self.ops = s, device, kernels_for(device)
        pairs, q_heads = s.rows * s.heads, s.heads * s.group
        page_table = 1 + torch.randperm(s.rows * s.blocks, device=device).to(torch.int32).view(
            s.rows, s.blocks
        )
        visited = max(s.attended_bytes + s.scored_bytes, 1)
        if count is None:
            count = max(2, min(LAYERS, -(-STATE_BYTES // visited))) if device.type == "cuda" else 1
        self.layers = [Layer(s, device, page_table) for _ in range(count)]
        self.page_table = page_table
        pinned = device.type == "cuda"
        # one page stands for all: only the tail's is written, and which one it is does not matter here
        page = torch.zeros(1, s.heads, 2, s.block_size, s.dim, dtype=s.dtype, pin_memory=pinned)
        host = page.expand(s.rows * s.blocks + 1, *page.shape[1:])
        self.k_host, self.v_host = host.unbind(2)
        self.host_blocks = host.flatten(2)
        self.q = torch.randn(s.rows, q_heads, s.dim, device=device, dtype=s.dtype)
        self.k_new = torch.randn(s.rows, s.heads, s.dim, device=device, dtype=s.dtype)
        self.seq_lens = torch.full((s.rows,), s.blocks * s.block_size - 1, dtype=torch.int32, device=device)
        self.step = torch.ones(1, dtype=torch.int32, device=device)
        self.logits = torch.zeros(s.rows, q_heads, s.blocks, device=device)
        self.arrivals, self.num_selected = (
            torch.zeros(s.rows, s.heads, dtype=torch.int32, device=device) for _ in range(2)
        )
        self.scores = torch.zeros(s.rows, s.heads, s.blocks, device=device)
        self.mass = torch.zeros(s.rows, s.heads, s.budget, device=device)
        self.selected, self.hits, self.misses = (
            torch.full((s.rows, s.heads, s.budget), -1, dtype=torch.int32, device=device) for _ in range(3)
        )
        loads = STEPS_BETWEEN * LAYERS * pairs * s.budget  # where nothing empties the list in between
        self.load_src, self.load_dst, self.load_at = (
            torch.zeros(loads, dtype=torch.int32, device=device) for _ in range(3)
        )
        self.load_count = torch.zeros(1, dtype=torch.int32, device=device)
        self.loaded = torch.zeros(1, dtype=torch.int64, device=device)
        self.out = torch.zeros_like(self.q)
        recent = max(1, s.budget // 4)
        query = (s.budget - 1 - recent) // 2
        self.policy = {
            "block_size": s.block_size, "sink_blocks": 1, "recent_blocks": recent, "query_blocks": query,
            "agnostic_blocks": s.budget - 1 - recent - query, "heat_decay": 0.9, "normalise": "sum",
        }  # fmt: skip
        selection, shares = SelectionConfig(), {k: v for k, v in self.policy.items() if k.endswith("_blocks")}
        index = Index(group_blocks=selection.index_group, keep=selection.index_keep)
        groups = groups_to_open(
            Policy(block_budget=s.budget, heat_decay=self.policy["heat_decay"], **shares), s.blocks, index
        )
        self.opened = Opened(s, groups, count, device) if groups.candidates < s.blocks else None
        self.split()
        for layer in self.layers:  # the loads of the first step are pretended: every block is resident then
            self.load_count.zero_()
            self.decide(layer)
        self.load_count.zero_()
        self.decide(self.layers[0])  # leaves the lists of a step without misses
        synchronise(device)

    def split(self) -> None:
        """Size the partials by what `launch` says now."""
        s = self.shape
        self.hit_splits = launch.attend_splits(s.rows * s.heads, s.budget, self.device)
        parts = self.hit_splits + launch.late_parts(s.budget, s.block_bytes)
        self.parts = torch.zeros(parts, s.rows, s.heads * s.group, s.dim, device=self.device)
        self.lse_parts = torch.zeros(parts, s.rows, s.heads * s.group, device=self.device)
        estimates = launch.estimate_splits(s.rows * s.heads, s.blocks, self.device)
        self.estimate_parts = torch.zeros(estimates, s.rows, s.heads * s.group, s.dim, device=self.device)
        self.estimate_lse = torch.zeros(estimates, s.rows, s.heads * s.group, device=self.device)

    def append(self, x: Layer) -> None:
        """Append one token."""
        self.ops.append(
            self.k_new, self.k_new, self.seq_lens, self.page_table, self.k_host, self.v_host, x.k_pool, x.v_pool,
            *x.tables, self.step, x.summary, self.load_count, sink_blocks=1, summary_kind="mean",
        )  # fmt: skip

    def decide(self, x: Layer, opened: Opened | None = None) -> None:
        """Score, select and resolve in one launch, among all blocks or those of open groups."""
        scratch, lists = (self if opened is None else opened), {}
        scores = self.scores if opened is None else opened.block_scores
        if opened is not None:
            lists = {"open_groups": opened.lists, "num_open": opened.count}
            lists["group_blocks"] = opened.groups.group_blocks
        self.ops.decide(
            self.q, x.summary, x.heat, self.seq_lens, self.page_table, *x.tables, self.step, scratch.logits,
            self.arrivals, scores, self.selected, self.num_selected, self.hits, self.misses,
            self.load_src, self.load_dst, self.load_at, self.load_count, x.counters,
            score="mean", softmax_scale=self.shape.dim**-0.5, **self.policy, **lists,
        )  # fmt: skip

    def open_groups(self, x: Layer) -> None:
        """Say which groups of blocks `decide` looks into."""
        o = self.opened
        assert o is not None
        self.ops.open_groups(
            self.q, o.bounds[self.layers.index(x)], x.summary, x.heat, self.page_table, self.seq_lens, self.arrivals,
            o.scores, o.lists, o.count, block_size=self.shape.block_size, **asdict(o.groups),
        )  # fmt: skip

    def open_and_decide(self, x: Layer) -> None:
        """The index of two levels: both launches."""
        self.open_groups(x)
        self.decide(x, self.opened)

    def score(self, x: Layer) -> None:
        """Score alone."""
        self.ops.score_mean(
            self.q, x.summary, self.page_table, self.seq_lens, self.logits, self.arrivals, self.scores,
            softmax_scale=self.shape.dim**-0.5, block_size=self.shape.block_size,
        )  # fmt: skip

    def select(self, x: Layer) -> None:
        """Select alone."""
        self.ops.select(self.scores, x.heat, self.seq_lens, self.selected, self.num_selected, **self.policy)

    def resolve(self, x: Layer) -> None:
        """Resolve alone."""
        limits = {name: self.policy[name] for name in ("block_size", "sink_blocks", "recent_blocks")}
        self.ops.resolve(
            self.selected, self.num_selected, self.seq_lens, self.page_table, *x.tables, self.step, self.hits,
            self.misses, self.load_src, self.load_dst, self.load_at, self.load_count, x.counters, **limits,
        )  # fmt: skip

    def gather(self, x: Layer) -> None:
        """Copy what is missing (nothing here)."""
        self.ops.gather(self.load_src, self.load_dst, self.load_count, self.host_blocks, x.pool, self.loaded)

    def attend(self, x: Layer) -> None:
        """Attend to the hits."""
        hits = slice(0, self.hit_splits)
        self.ops.attend(
            self.q, x.k_pool, x.v_pool, self.selected, self.hits, self.seq_lens, self.parts[hits],
            self.lse_parts[hits], softmax_scale=self.shape.dim**-0.5, soft_cap=None, window=None,
        )  # fmt: skip

    def attend_fetch(self, x: Layer) -> None:
        """Attend to the hits; load and attend to the misses (none here)."""
        self.ops.attend_fetch(
            self.q, x.k_pool, x.v_pool, self.selected, self.hits, self.misses, self.seq_lens,
            self.load_src, self.load_dst, self.load_at, self.load_count, self.host_blocks, x.pool, self.loaded,
            self.hit_splits, self.parts, self.lse_parts,
            softmax_scale=self.shape.dim**-0.5, soft_cap=None, window=None,
        )  # fmt: skip

    def merge(self, x: Layer) -> None:
        """Merge what hits and misses (none here) gave."""
        self.ops.merge(
            self.parts, self.lse_parts, None, self.out, None, splits=self.hit_splits, late_slots=self.misses
        )

    def attend_and_merge(self, x: Layer) -> None:
        """Attend to the hits and merge, which splits trade against each other."""
        self.attend_fetch(x)
        self.merge(x)

    def attend_centroids(self, x: Layer) -> None:
        """Estimate what is not selected (`selection.remainder`)."""
        self.ops.attend_centroids(
            self.q, x.summary, x.value_summary, self.page_table, self.seq_lens, self.selected, self.estimate_parts,
            self.estimate_lse, softmax_scale=self.shape.dim**-0.5, soft_cap=None, block_size=self.shape.block_size,
        )  # fmt: skip

    def block_mass(self, x: Layer) -> None:
        """Weigh the attended blocks (`selection.heat_from`)."""
        self.ops.block_mass(
            self.q, x.k_pool, self.selected, self.hits, self.seq_lens, self.lse_parts[0], self.mass,
            softmax_scale=self.shape.dim**-0.5, soft_cap=None,
        )  # fmt: skip

    def layer(self, x: Layer) -> None:
        """One layer of a step."""
        for op in (self.append, self.decide, self.attend_fetch, self.merge):
            op(x)

    def layer_of_single_ops(self, x: Layer) -> None:
        """The same by one op after the other."""
        for op in (self.append, self.score, self.select, self.resolve, self.attend, self.merge):
            op(x)

    def floors(self) -> dict[str, int]:
        """Bytes that must be read from device memory, by op; others move next to nothing."""
        s = self.shape
        both = s.attended_bytes + s.scored_bytes
        o = self.opened
        bounds = 0 if o is None else o.bounds[0].nbytes
        candidates = 0 if o is None else s.scored_bytes * o.groups.candidates // s.blocks
        return {
            "score": s.scored_bytes, "decide": s.scored_bytes, "attend": s.attended_bytes,
            "open_groups": bounds, "open_and_decide": bounds + candidates,
            "attend_fetch": s.attended_bytes,
            "attend_centroids": 2 * s.scored_bytes * max(s.blocks - s.budget, 0) // s.blocks,
            "block_mass": s.attended_bytes // 2,
            "layer": both, "layer_of_single_ops": both,
        }  # fmt: skip

    def time_ms(self, fn: Callable[[Layer], None], samples: int) -> list[float]:
        """Milliseconds of one call, from replays of a graph of LAYERS calls (on the CPU from LAYERS // 8 calls)."""
        turns = list(
            itertools.islice(itertools.cycle(self.layers), LAYERS if self.device.type == "cuda" else 2)
        )

        def all_layers() -> None:
            for layer in turns:
                fn(layer)

        all_layers()
        run = all_layers
        if self.device.type == "cuda":
            synchronise(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                all_layers()
            run = graph.replay
            self._settle(run)
        times = [ms / len(turns) for ms in time_calls(run, samples, self.device)]
        assert int(self.load_count) == 0, "blocks were missing: not the step that is meant to be timed"
        return times

    def _settle(self, run: Callable[[], object]) -> None:
        """Replay until the heat follows the scores: from then on the same blocks are selected, and all are there.

        Ops timed alone go on filling the load list, which only `append` empties: so it is emptied here.
        """
        for _ in range(SETTLING_ROUNDS):
            for _ in range(STEPS_BETWEEN):
                run()
            self.load_count.zero_()


TIMED = (
    "append", "score", "select", "resolve", "decide", "gather", "attend", "merge", "attend_fetch",
    "attend_centroids", "block_mass", "layer_of_single_ops", "layer",
)  # fmt: skip
INDEXED = ("open_groups", "open_and_decide")
"""Ops that there are only where the index of two levels leaves blocks out."""


def shape_of(rows: int, blocks: int, quick: bool, block_size: int = Shape.block_size) -> Shape:
    """Return the shape of a case; `quick` is one that a CPU finishes in no time."""
    if quick:
        return Shape(rows=rows, blocks=blocks, dtype=torch.float32, **QUICK_SHAPE)
    budget, capacity = (tokens // block_size for tokens in (BUDGET_TOKENS, CAPACITY_TOKENS))
    return Shape(rows=rows, blocks=blocks, block_size=block_size, budget=budget, capacity=capacity)


def run_kernels(
    shapes: Sequence[Shape],
    device: torch.device,
    add: Callable[[Row], None],
    ops: Sequence[str] = (*TIMED, *INDEXED),
) -> Rates:
    """Time the ops of every shape, handing rows to `add`; returns the rates of the floors."""
    quick = device.type == "cpu"
    rates = measure_rates(device, 2**24 if quick else 2**30)
    for shape in shapes:
        step = Step(shape, device)
        floors = step.floors()
        for name in ops:
            if name in INDEXED and step.opened is None:
                continue
            times = Quantiles.of(step.time_ms(getattr(step, name), 3 if quick else REPLAYS))
            add(_row(step.shape, name, times, 1e3 * floors.get(name, 0) / rates.memory))
        del step
    return rates


def _row(s: Shape, name: str, times: Quantiles, floor_ms: float) -> Row:
    us = times.map(lambda ms: 1e3 * ms)
    row = Row(
        suite="kernels",
        case_id=f"{name}-b{s.rows}-n{s.blocks}x{s.block_size}",
        metric="time",
        unit="us",
        p20=us.p20,
        p50=us.p50,
        p80=us.p80,
        n=us.n,
        baseline=name,
        dtype=str(s.dtype).removeprefix("torch."),
        batch=s.rows,
        context_len_tokens=s.blocks * s.block_size,
        block_size=s.block_size,
        token_budget=s.budget * s.block_size,
    )
    return replace(row, floor_ms=floor_ms, frac_of_floor=floor_ms / times.p50) if floor_ms else row
