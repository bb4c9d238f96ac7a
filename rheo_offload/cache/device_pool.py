"""The device side of one layer: the pool with its residency tables, or the ring of a sliding layer.

Every tensor a decode kernel touches is allocated here once and keeps its address, so that a captured step stays
valid. Slots are shared out evenly over the first `sharing_rows` rows: row b, head h owns
`1 + (b * Hkv + h) * capacity ...`, and slot 0 is scratch that belongs to nobody. Who owns what is device data
(`slot_base`, `slot_count`), so the shares can change between two steps without touching a captured one.
"""

import copy

import torch

from rheo_offload.cache.layout import BlockLayout, ring_tokens
from rheo_offload.types import LayerSpec

NUM_COUNTERS = 5  # selected, hits, forced selected, forced hits, evictions
TRAFFIC = ("loaded", "warmed", "prefill", "streamed", "audited")  # blocks read from the host, by purpose


class FullLayer:
    """Pool, residency tables, summaries, heat and bias of one full-attention layer."""

    def __init__(
        self,
        spec: LayerSpec,
        layout: BlockLayout,
        host_blocks: torch.Tensor,
        *,
        rows: int,
        max_blocks: int,
        capacity: int,
        summary_kind: str,
        summary_width: int,
        value_width: int,
        max_pages: int,
        device: torch.device,
        bias_units: int = 0,
        group_blocks: int = 0,
    ) -> None:
        """Allocate the layer.

        Args:
            spec: the layer.
            layout: of its blocks.
            host_blocks: [P, Hkv, E] view of the host store.
            rows: rows of the batch.
            max_blocks: logical blocks per row (N).
            capacity: slots per (row, KV head).
            summary_kind: `none`, `mean`, `minmax`, `cuboid`, or `own`: written by the method, not by the ops.
            summary_width: summary vectors per block (W).
            value_width: mean values kept per block, for `selection.remainder`; 0 = none.
            max_pages: host pages that summaries must cover.
            device: of the pool.
            bias_units: parts of a block whose mean bias is kept, to rank blocks by; 0: the bias ranks nothing.
            group_blocks: blocks of a group whose bounds are kept (`selection.index`); 0: none are.
        """
        self.spec, self.layout, self.device = spec, layout, device
        self.rows, self.max_blocks = rows, max_blocks
        self._views: dict[tuple[int, int], FullLayer] = {}
        self.host_blocks = host_blocks
        self.k_host, self.v_host = layout.split(host_blocks)
        self.bias_host = layout.bias(host_blocks)
        self.summary_kind, self.summary_width, self.value_width = summary_kind, summary_width, value_width
        self.bias_units = bias_units
        self.pool_blocks = torch.empty(
            1 + rows * spec.num_kv_heads * capacity, layout.elements, dtype=layout.dtype, device=device
        )
        self.k_pool, self.v_pool = layout.split(self.pool_blocks)
        self.bias_pool = layout.bias(self.pool_blocks)
        self.slot_base = torch.ones(rows, spec.num_kv_heads, dtype=torch.int32, device=device)
        self.slot_count = torch.zeros_like(self.slot_base)
        slots = self.pool_blocks.shape[0]
        self.block_in = torch.full((slots,), -1, dtype=torch.int32, device=device)
        self.last_used = torch.zeros(slots, dtype=torch.int32, device=device)
        shape = (rows, spec.num_kv_heads, max_blocks)
        self.slot_of = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.heat = torch.zeros(shape, dtype=torch.float32, device=device)
        self.group_blocks = group_blocks
        self.group_bounds: torch.Tensor | None = None
        """[rows, Hkv, M, 2, D]: extremes of the mean keys of every complete group; others may hold anything."""
        if group_blocks:
            bounds = (*shape[:2], -(-max_blocks // group_blocks), 2, spec.head_dim)
            self.group_bounds = torch.empty(bounds, dtype=layout.dtype, device=device)
        self.counters = torch.zeros(rows, spec.num_kv_heads, NUM_COUNTERS, dtype=torch.int64, device=device)
        self.traffic = torch.zeros(len(TRAFFIC), dtype=torch.int64, device=device)
        self.summary: torch.Tensor | None = None
        self.value_summary: torch.Tensor | None = None
        self.unit_bias: torch.Tensor | None = None
        """fp32 [pages, Hkv, bias_units]: mean bias of the parts of a block; unfinished ones may hold anything."""
        self.cover_pages(max_pages)
        self.capacity = self.sharing_rows = 0
        self.share_slots(rows)

    @property
    def op_summary_kind(self) -> str:
        """The summary kind that the op `append` writes."""
        return "none" if self.summary_kind == "own" else self.summary_kind

    @property
    def op_summary(self) -> torch.Tensor | None:
        """What the op `append` writes it to."""
        return None if self.summary_kind == "own" else self.summary

    def traffic_of(self, purpose: str) -> torch.Tensor:
        """Return the one-element counter of blocks read from the host for a purpose in `TRAFFIC`."""
        i = TRAFFIC.index(purpose)
        return self.traffic[i : i + 1]

    def share_slots(self, rows: int, *, most: int | None = None) -> None:
        """Share all slots out over the first `rows` rows, evenly; the others own none. Drops everything resident.

        Args:
            rows: rows that get slots.
            most: slots per (row, KV head) at most; None: the blocks a row can hold.
        """
        heads = self.spec.num_kv_heads
        fair = (self.pool_blocks.shape[0] - 1) // (rows * heads)
        self.capacity, self.sharing_rows = min(fair, max(self.max_blocks, 1) if most is None else most), rows
        order = torch.arange(rows * heads, dtype=torch.int32, device=self.device).view(rows, heads)
        self.slot_base[:rows] = 1 + self.capacity * order
        self.slot_count.zero_()
        self.slot_count[:rows] = self.capacity
        self.slot_of.fill_(-1)
        self.block_in.fill_(-1)
        self._views.clear()

    def view(self, rows: slice) -> "FullLayer":
        """Return this layer as the given rows see it: the same memory, tables narrowed to those rows."""
        key = (rows.start, rows.stop)
        if key == (0, self.rows):
            return self
        if key not in self._views:
            narrow = copy.copy(self)
            narrow.rows, narrow._views = rows.stop - rows.start, {}
            for name in ("slot_of", "heat", "counters", "slot_base", "slot_count"):
                setattr(narrow, name, getattr(self, name)[rows])
            if self.group_bounds is not None:
                narrow.group_bounds = self.group_bounds[rows]
            self._views[key] = narrow
        return self._views[key]

    @property
    def by_row(self) -> list[torch.Tensor]:
        """What is known of a row's blocks beside where they are, and follows the row: heat, bounds of groups."""
        return [t for t in (self.heat, self.group_bounds) if t is not None]

    @property
    def by_page(self) -> list[torch.Tensor]:
        """What is kept per host page: summaries of keys and of values, mean biases; those that there are."""
        return [t for t in (self.summary, self.value_summary, self.unit_bias) if t is not None]

    def cover_pages(self, max_pages: int) -> bool:
        """Make what is kept per page reach `max_pages` host pages, keeping what it holds; returns whether it moved."""
        heads, dtype, dim = self.spec.num_kv_heads, self.layout.dtype, self.spec.head_dim
        widths = {
            "summary": (0 if self.summary_kind == "none" else self.summary_width, (dim,), dtype),
            "value_summary": (self.value_width, (dim,), dtype),
            "unit_bias": (self.bias_units, (), torch.float32),
        }
        moved = False
        for name, (width, vector, kind) in widths.items():
            old = getattr(self, name)
            if width and (old is None or len(old) < max_pages):
                setattr(self, name, self._longer(old, max_pages, (heads, width, *vector), kind))
                moved = True
        if moved:
            self._views.clear()
        return moved

    def _longer(
        self, old: torch.Tensor | None, pages: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return [at least pages, *shape] that begins with `old`."""
        by_half = old.shape[0] * 3 // 2 if old is not None else 0  # a long generation asks often
        new = torch.empty(max(pages, by_half), *shape, dtype=dtype, device=self.device)
        if old is not None:
            new[: old.shape[0]] = old
        return new

    @property
    def device_bytes(self) -> int:
        """Device memory of this layer's cache."""
        tables = (self.pool_blocks, self.slot_of, self.block_in, self.last_used)
        return sum(t.nbytes for t in (*tables, *self.by_row, *self.by_page))


class SlidingLayer:
    """The last tokens of every row of a sliding-window layer, in a ring: token at position p sits at p % R.

    Whole blocks of the ring double as the slots of a pool, so that decode attention needs no kernel of its own.
    """

    def __init__(
        self, spec: LayerSpec, *, rows: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert spec.window is not None
        self.spec, self.block_size, self.rows = spec, block_size, rows
        self.ring_tokens = ring_tokens(spec.window, block_size)
        shape = (rows, spec.num_kv_heads, self.ring_tokens, spec.head_dim)
        self.k_ring = torch.empty(shape, dtype=dtype, device=device)
        self.v_ring = torch.empty(shape, dtype=dtype, device=device)

    @property
    def ring_blocks(self) -> int:
        """Blocks in a ring."""
        return self.ring_tokens // self.block_size

    @property
    def k_pool(self) -> torch.Tensor:
        """Keys as slots [rows * Hkv * ring_blocks, C, D]."""
        return self.k_ring.view(-1, self.block_size, self.spec.head_dim)

    @property
    def v_pool(self) -> torch.Tensor:
        """Values as slots, like `k_pool`."""
        return self.v_ring.view(-1, self.block_size, self.spec.head_dim)

    @property
    def device_bytes(self) -> int:
        """Device memory of this layer's rings."""
        return self.k_ring.nbytes + self.v_ring.nbytes

    def history(self, start: torch.Tensor, length: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the `length` tokens before position `start[b]` out of the ring, in order.

        Returns keys and values [B, Hkv, length, D]; entries at negative positions hold anything.
        """
        positions = start[:, None] - length + torch.arange(length, dtype=start.dtype, device=start.device)
        entry = (positions % self.ring_tokens).long()[:, None, :, None]
        k, v = self.k_ring[rows], self.v_ring[rows]
        entry = entry.expand(-1, k.shape[1], -1, k.shape[3])
        return k.gather(2, entry), v.gather(2, entry)

    def move(self, source: int, target: int) -> None:
        """Give row `target` the ring of row `source`."""
        self.k_ring[target] = self.k_ring[source]
        self.v_ring[target] = self.v_ring[source]

    def reorder(self, source_rows: torch.Tensor) -> None:
        """Give row i the ring of row `source_rows[i]`."""
        self.k_ring.copy_(self.k_ring[source_rows])
        self.v_ring.copy_(self.v_ring[source_rows])
