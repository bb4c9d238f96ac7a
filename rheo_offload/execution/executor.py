"""What one batch's forward passes share: the cache, the kernels, the method, the scratch buffers.

`forward` is called once per layer and model forward; the first layer's call begins the step.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from rheo_offload.cache.device_pool import FullLayer, SlidingLayer
from rheo_offload.cache.kv_cache import KVCache
from rheo_offload.cache.sizing import allocate_shrinking, capacity_floor
from rheo_offload.errors import CacheError
from rheo_offload.execution.audit import Audit
from rheo_offload.execution.decode import decode_full, decode_sliding
from rheo_offload.execution.observer import StepObserver
from rheo_offload.execution.prefill import Chunk, prefill_full, prefill_sliding, warm
from rheo_offload.execution.raised import RaisedBudgets
from rheo_offload.execution.workspace import DecodeWorkspace, RingWorkspace, RoundsWorkspace
from rheo_offload.ops import kernels_for
from rheo_offload.selection.base import LayerSelectors, Selector
from rheo_offload.selection.full import Full
from rheo_offload.selection.heat_ranked import AttentionHeat, HeatRanked
from rheo_offload.selection.index import Groups, Index, groups_to_open
from rheo_offload.selection.policy import check_context
from rheo_offload.selection.refined import TokenRule, token_rule_of
from rheo_offload.types import AttentionCall, Policy

# Longest staging buffer, in blocks of one (row, head), and how many bytes it may take for a whole batch.
STAGE_BLOCKS = 256
STAGE_BYTES = 128 << 20


class Executor:
    """See the module."""

    def __init__(
        self,
        cache: KVCache,
        selector: Selector | LayerSelectors,
        policy: Policy,
        *,
        dense_layers: Sequence[int] = (),
        heat_from: str = "scores",
        reuse_layers: Mapping[int, int] | None = None,
        reuse_steps: int = 1,
        index: Index | None = None,
        kernels: str = "auto",
        overlap: bool = True,
        audit_every: int = 0,
        raise_below: float = 0.0,
        capacity_for: Callable[[int, int], int] | None = None,
    ) -> None:
        """Wire a cache to a method.

        Args:
            cache: of the batch.
            selector: the method.
            policy: its budget in blocks.
            dense_layers: layers that attend to everything.
            heat_from: `scores` of the method, or `attention`, the weights of what was read in their place.
            reuse_layers: layers that attend to what an earlier one selected in the same step, with that one.
            reuse_steps: steps that a selection serves.
            index: how groups of blocks are opened ahead of the ranking; None: every block is ranked.
            kernels: as `ops.kernels_for`.
            overlap: load missing blocks beside the attention over the resident ones, not ahead of it.
            audit_every: decode steps between two measurements of the captured mass; 0 = never.
            raise_below: captured mass below which a layer's budget grows; 0 = never.
            capacity_for: (blocks per row, device bytes about to be given back) -> slots per (row, KV head), asked
                when the cache must grow.
        """
        self.cache, self.selector, self.policy = cache, selector, policy
        self.ops = kernels_for(cache.device, kernels)
        self.reference_ops = kernels_for(cache.device, "reference")
        self.overlap = overlap
        self.audit = Audit(audit_every, cache.device)
        self.audit_now = False
        self.raised = RaisedBudgets(raise_below)
        self.observer: StepObserver | None = None
        self.wants_heat = True
        self.decode_steps = self.row_steps = 0
        self.profiler: Callable[[str], AbstractContextManager[None]] | None = None
        self._dense, self._full = frozenset(dense_layers), Full()
        self._heat_from = heat_from
        self.reuse_layers, self._reuse_steps = dict(reuse_layers or {}), reuse_steps
        self.index = index
        self._lists: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of selections that are used again
        self._capacity_for = capacity_for
        self._first = min([*cache.full, *cache.sliding])
        self._last = max([*cache.full, *cache.sliding])
        self._chunk: Chunk | None = None
        self._open: int | None = None  # layer that the forward in progress has reached
        self._failed = False
        self._workspaces: dict[tuple[Hashable, ...], DecodeWorkspace] = {}
        self._ring_workspaces: dict[tuple[int, ...], RingWorkspace] = {}
        self._rounds: dict[tuple[int, ...], RoundsWorkspace] = {}
        self._staging: dict[tuple[int, ...], torch.Tensor] = {}
        self.decode_start = torch.zeros_like(cache.seq_lens)
        self._due, self._scored_lens = torch.ones_like(cache.seq_lens), torch.zeros_like(cache.seq_lens)

    # ---- one forward -----------------------------------------------------------------------------------------------

    def begin_prefill(self, rows: slice, start: Sequence[int], tokens: int) -> None:
        """Open a forward of `tokens` new tokens for `rows`; `start[b]` is the first one's position (negative: padding).

        Host and device clocks advance here, before any layer runs.

        Raises:
            HostMemoryError: the pages do not fit; nothing changed.
        """
        cache = self.cache
        before = cache.lengths[rows]
        after = [max(n, s + tokens) for n, s in zip(before, start, strict=True)]
        lengths = list(cache.lengths)
        lengths[rows] = after
        self.make_room(max(lengths))
        cache.reserve(lengths)

        on_device = [cache.upload(values) for values in (start, before, after)]
        self._chunk = Chunk(rows, before, after, *on_device)
        cache.advance_host([n - old for n, old in zip(lengths, cache.lengths, strict=True)])
        cache.set_device_lengths(rows)

    def begin_decode(self) -> None:
        """Open a forward of one token for every row: the host part, then the device part."""
        self.begin_decode_on_host()
        self.cache.after_decode()
        self.begin_decode_on_device(self.cache.rows)

    def begin_decode_on_host(self, rows: Sequence[int] | None = None) -> None:
        """Room for a token of each row in `rows` (None: all); runs ahead of every step."""
        self.make_room(max(self.cache.lengths) + 1)
        self.cache.before_decode(rows)
        if self.audit_now and self.raised.below:
            self.audit.fetch()
        self.decode_steps += 1
        self.row_steps += self.cache.rows if rows is None else len(rows)
        self.audit_now = self.audit.due(self.decode_steps)
        if self.audit_now:
            self.raised.learn(self.audit.fetched(), self.cache.full, self.policy)
        if self.observer is not None:
            self.observer.before_step(rows)

    def begin_decode_on_device(self, rows: int) -> None:
        """Advance the device clock and the rings' block numbers for the first `rows` rows (part of a captured step)."""
        self._chunk = None
        cache = self.cache
        cache.begin_decode(rows)
        if self.observer is not None:
            self.observer.begin(rows)
        # position of the new token; negative where a row sits out, so that its ring stays as it is
        torch.sub(cache.step_lens[:rows], 1, out=self.decode_start[:rows])
        if self._reuse_steps > 1:
            self._mark_due(rows)
        rings = {id(ws): ws for ws in (self.ring_workspace_of(s, rows) for s in cache.sliding.values())}
        for ring in rings.values():
            ring.refresh(cache.step_lens[:rows], cache.block_size)

    def _mark_due(self, rows: int) -> None:
        """Find the rows that select in this step: at every n-th token of a block, or where nothing valid is kept.

        A block begins with such a token, so between two selections no block is opened or closed, and what was
        selected stays complete: sink and recent blocks are the same.
        """
        lens, made = self.cache.step_lens[:rows], self.cache.listed_at[:rows]
        start = lens - (lens - 1) % self.cache.block_size % self._reuse_steps
        self._due[:rows] = (start == lens) | (start != made)
        torch.mul(lens, self._due[:rows], out=self._scored_lens[:rows])
        made.copy_(torch.where(lens > 0, start, -1))

    def due(self, rows: slice) -> torch.Tensor | None:
        """Return which rows select in this step, int32; None: all."""
        return self._due[rows] if self._reuse_steps > 1 else None

    def scored_lens(self, rows: slice) -> torch.Tensor:
        """Return the lengths that scorers see: 0 for rows that do not select in this step."""
        return (self._scored_lens if self._reuse_steps > 1 else self.cache.step_lens)[rows]

    def forward(self, layer_idx: int, call: AttentionCall) -> torch.Tensor:
        """Run one layer of the forward that was begun: [B, Hq, Q, D] in q's dtype.

        Raises:
            CacheError: an earlier forward stopped half-way, so layers disagree about the tokens they hold.
        """
        if layer_idx != self._first and self._open != layer_idx - 1:
            raise CacheError(
                f"layer {layer_idx} was called after layer {self._open}: an earlier forward did not finish; "
                "start a new cache"
            )
        self._open = layer_idx
        full = self.cache.full.get(layer_idx)
        sliding = self.cache.sliding.get(layer_idx)
        if self._chunk is not None:
            if full is not None:
                return prefill_full(self, full, call, self._chunk)
            assert sliding is not None
            return prefill_sliding(self, sliding, call, self._chunk)
        if full is not None:
            return decode_full(self, full, call)[:, :, None]
        assert sliding is not None
        return decode_sliding(self, sliding, call)[:, :, None]

    @property
    def between_forwards(self) -> bool:
        """Whether the last forward reached its last layer (and the cache did not break while it grew)."""
        return not self._failed and (self._open is None or self._open == self._last)

    def warm(self, rows: slice | None = None) -> None:
        """Load sink, recent and hottest blocks of `rows` (None: all), after a prompt or once slots were shared anew."""
        warm(self, rows or slice(0, self.cache.rows))

    @contextmanager
    def abandoned_if_it_fails(self) -> Iterator[None]:
        """Take a forward back that was only recorded: if it stops half-way, nothing has happened."""
        before = self._open
        try:
            yield
        except BaseException:
            self._open = before
            raise

    @contextmanager
    def broken_if_it_fails(self) -> Iterator[None]:
        """Refuse further use of the cache when a step stops half-way: the device's clock may be ahead of the host's."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def make_room(self, tokens: int) -> None:
        """Grow the tables when a row outgrows them (doubling, so that it happens rarely)."""
        needed = self.cache.blocks_of(tokens)
        check_context(self.selector, self.policy.block_budget, needed, self.cache.block_size)
        if needed <= self.cache.max_blocks:
            return
        max_blocks = max(needed, 2 * self.cache.max_blocks)
        capacity = self.cache.capacity
        if self._capacity_for is not None:
            capacity = self._capacity_for(max_blocks, self.cache.device_bytes)
        self._workspaces.clear()
        self._rounds.clear()
        self._failed = True  # until the new pools stand: half of them would be no cache
        floor = capacity_floor(self.policy.block_budget, max_blocks, 1.0)
        allocate_shrinking(lambda slots: self.cache.grow(max_blocks, slots), capacity, floor)
        self._failed = False

    # ---- per layer -------------------------------------------------------------------------------------------------

    def is_dense(self, layer: FullLayer) -> bool:
        """Whether the layer attends to everything."""
        return layer.spec.layer_idx in self._dense or self.selector.name == "full"

    @property
    def version(self) -> Hashable:
        """What ends a captured step: memory that moved, a dense layer that (no longer) fits, who looks on, a raise."""
        streamed = tuple(i for i, layer in self.cache.full.items() if self.is_streamed(layer))
        budgets = tuple(
            (i, self.raised.blocks_of(self.cache.full[i], self.policy)) for i in self.raised.layers
        )
        return self.cache.version, streamed, self.observer, budgets

    def is_streamed(self, layer: FullLayer) -> bool:
        """Whether the layer attends to more blocks than its pool holds."""
        return self.is_dense(layer) and layer.capacity < layer.max_blocks

    def selector_of(self, layer: FullLayer) -> Selector:
        """Return the layer's method: the configured one, or `full` for layers kept dense."""
        if self.is_dense(layer):
            return self._full
        method = self.selector
        return method.for_layer(layer.spec.layer_idx) if isinstance(method, LayerSelectors) else method

    def source_of(self, layer: FullLayer) -> int | None:
        """Return the layer whose selection this one takes; None: it selects itself."""
        return self.reuse_layers.get(layer.spec.layer_idx)

    def heat_of(self, layer: FullLayer) -> torch.Tensor:
        """Return the heat by which a layer's blocks are chosen: of the layer it reuses, or its own."""
        source = self.source_of(layer)
        return layer.heat if source is None else self.cache.full[source].heat[: layer.rows]

    def policy_of(self, layer: FullLayer) -> Policy:
        """Return the layer's policy: the configured one or as raised, or everything for layers kept dense."""
        if not self.is_dense(layer):
            return self.raised.policy_of(layer, self.policy)
        return replace(
            self.policy,
            block_budget=layer.max_blocks,
            sink_blocks=0,
            recent_blocks=1,
            query_blocks=0,
            agnostic_blocks=0,
            rule="fixed",
        )

    def groups_of(self, layer: FullLayer) -> Groups | None:
        """Return which groups of blocks the layer opens in a step; None: it ranks all blocks, or none itself.

        A table too short to gain from the index is ranked whole. That depends on nothing but its length, so a layer
        that opens groups has done so, and kept their bounds, since the table got this length.
        """
        if layer.group_bounds is None or self.index is None:
            return None
        if self.is_dense(layer) or self.source_of(layer) is not None:
            return None
        if groups_to_open(self.policy, layer.max_blocks, self.index).candidates >= layer.max_blocks:
            return None
        return groups_to_open(self.policy_of(layer), layer.max_blocks, self.index)

    def token_rule_of(self, layer: FullLayer) -> TokenRule | None:
        """Return which tokens of the selected blocks the layer attends to; None: all of them."""
        return token_rule_of(self.selector_of(layer))

    def attention_heat_of(self, layer: FullLayer) -> AttentionHeat | None:
        """Return how the weights of a step's attention enter the layer's heat; None: they do not."""
        if self.source_of(layer) is not None:
            return None  # its blocks are chosen by the heat of the layer it reuses
        selector = self.selector_of(layer)
        if isinstance(selector, HeatRanked):
            return selector.attention_heat
        if self._heat_from == "attention" and selector.query_aware:
            return AttentionHeat(self.policy.heat_decay)
        return None

    def starts_from_attention(self, layer: FullLayer) -> bool:
        """Whether a prompt leaves the weights of its last queries as the layer's heat, in place of their scores."""
        return isinstance(self.selector_of(layer), HeatRanked) or self.attention_heat_of(layer) is not None

    def workspace_of(self, layer: FullLayer) -> DecodeWorkspace:
        """Return the decode scratch that all layers of this geometry and budget share."""
        budget = 1 if self.is_streamed(layer) else self.policy_of(layer).block_budget
        groups = self.groups_of(layer)
        key = (
            layer.rows,
            layer.spec.num_kv_heads,
            layer.spec.num_q_heads,
            layer.spec.head_dim,
            layer.max_blocks,
            layer.summary_width,
            budget,
            groups,
        )
        if key not in self._workspaces:
            self._workspaces[key] = DecodeWorkspace(
                rows=layer.rows,
                num_kv_heads=layer.spec.num_kv_heads,
                num_q_heads=layer.spec.num_q_heads,
                head_dim=layer.spec.head_dim,
                max_blocks=layer.max_blocks,
                block_budget=budget,
                block_bytes=layer.layout.block_bytes,
                summary_width=layer.summary_width,
                estimates=layer.value_width > 0,
                device=layer.device,
                groups=groups,
            )
        source = self._lists_from(layer)
        if source is None:
            return self._workspaces[key]
        if source not in self._lists:
            whole = torch.full(
                (self.cache.rows, layer.spec.num_kv_heads, budget), -1, dtype=torch.int32, device=layer.device
            )
            self._lists[source] = whole, torch.zeros_like(whole[..., 0])
            self.cache.kept_lists += self._lists[source]
        own = (*key, source)
        if own not in self._workspaces:
            lists = (t[: layer.rows] for t in self._lists[source])
            self._workspaces[own] = self._workspaces[key].with_lists(*lists)
        return self._workspaces[own]

    def _lists_from(self, layer: FullLayer) -> int | None:
        """Return the layer whose lists of selected blocks this one uses; None: those that all layers share."""
        i = layer.spec.layer_idx
        if self.is_dense(layer):
            return None
        if i in self.reuse_layers:
            return self.reuse_layers[i]
        return i if self._reuse_steps > 1 or i in self.reuse_layers.values() else None

    def ring_workspace_of(self, layer: SlidingLayer, rows: int) -> RingWorkspace:
        """Return the scratch of a step over `rows` rows that all sliding layers of this geometry share."""
        spec = layer.spec
        key = (rows, spec.num_kv_heads, spec.num_q_heads, spec.head_dim, layer.ring_blocks)
        if key not in self._ring_workspaces:
            self._ring_workspaces[key] = RingWorkspace(
                rows=rows,
                num_kv_heads=spec.num_kv_heads,
                num_q_heads=spec.num_q_heads,
                head_dim=spec.head_dim,
                ring_blocks=layer.ring_blocks,
                device=self.cache.device,
            )
        return self._ring_workspaces[key]

    def rounds_workspace_of(self, layer: FullLayer) -> RoundsWorkspace:
        """Return the scratch for dense attention in rounds that all layers of this geometry share."""
        spec = layer.spec
        staging = self.staging(layer, layer.rows)
        key = (*staging.shape, spec.num_q_heads, spec.head_dim, layer.max_blocks)
        if key not in self._rounds:
            self._rounds[key] = RoundsWorkspace(
                staging, num_q_heads=spec.num_q_heads, head_dim=spec.head_dim, max_blocks=layer.max_blocks
            )
        return self._rounds[key]

    def staging(self, layer: FullLayer, rows: int) -> torch.Tensor:
        """Return the staging buffer [rows, Hkv, M, E] for a layer, shared by all layers of its geometry."""
        per_block = rows * layer.spec.num_kv_heads * layer.layout.block_bytes
        count = max(1, min(STAGE_BLOCKS, layer.max_blocks, STAGE_BYTES // per_block))
        key = (rows, layer.spec.num_kv_heads, count, layer.layout.elements)
        if key not in self._staging:
            self._staging[key] = torch.empty(*key, dtype=layer.layout.dtype, device=layer.device)
        return self._staging[key]

    def region(self, name: str) -> AbstractContextManager[Any]:
        """Time a part of the step when a profiler is set; free otherwise."""
        return self.profiler(name) if self.profiler is not None else nullcontext()
