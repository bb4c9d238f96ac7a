"""The KV cache of one batch: host pages, device pools, and the lengths that both sides agree on.

Two clocks: `lengths` (host, Python ints) and `seq_lens` (device). The host advances outside a captured step, the
device inside it.

    reserve   host pages for what a row will hold            -> host_table
    advance   both clocks, by a chunk (prefill) or one token (decode)
    reorder   rows become copies of other rows (beams, num_return_sequences): pages are shared, the open page is copied
    crop      the last n tokens never happened
    grow      room for longer rows: new tables and pools, filled from the host again
    release   a row becomes empty; move: a row becomes another, empty one
    share     the slots are dealt out anew to fewer or more rows
    close     give the pages back

`version` counts what a captured step would not survive: new tables, pools or summaries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rheo_offload.cache import residency
from rheo_offload.cache.device_pool import FullLayer, SlidingLayer
from rheo_offload.cache.group_bounds import complete_groups
from rheo_offload.cache.host_store import HostStore
from rheo_offload.cache.layout import PageLayout
from rheo_offload.device import synchronize
from rheo_offload.errors import CacheError
from rheo_offload.transfer.upload import Uploader
from rheo_offload.types import LayerSpec

# Pages a decode step allocates ahead of a row, so that most steps allocate nothing.
PAGES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class StepTables:
    """What the kernels of a decode step see of the rows that take part."""

    lens: torch.Tensor
    """int32 [rows]: tokens of each row, this step's included; 0 = the row sits this step out."""
    host_table: torch.Tensor
    step: torch.Tensor


class KVCache:
    """See the module."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        store: HostStore | None,
        page: PageLayout,
        *,
        rows: int,
        max_blocks: int,
        capacity: int,
        block_size: int,
        sink_blocks: int,
        summaries: Mapping[int, tuple[str, int, int]],
        dtype: torch.dtype,
        device: torch.device,
        bias_units: Mapping[int, int] | None = None,
        group_blocks: Mapping[int, int] | None = None,
        grouped_from: int = 0,
    ) -> None:
        """Allocate an empty cache.

        Args:
            specs: the model's attention layers.
            store: host pages; None when no layer has full attention.
            page: layout of a host page.
            rows: rows of the batch.
            max_blocks: logical blocks per row.
            capacity: slots per (row, KV head).
            block_size: tokens per block.
            sink_blocks: leading blocks that are never dropped.
            summaries: layer_idx -> (summary kind, summary width, mean values per block) of each full-attention layer.
            dtype: of keys and values.
            device: of the pool.
            bias_units: layer_idx -> parts of a block whose mean bias is kept; left out: none.
            group_blocks: layer_idx -> blocks of a group whose bounds are kept; left out: none.
            grouped_from: blocks of a row from which on they are.
        """
        self.specs, self.store, self.page = list(specs), store, page
        self.rows, self.block_size, self.sink_blocks = rows, block_size, sink_blocks
        self.dtype, self.device, self.summaries = dtype, device, summaries
        self.bias_units = bias_units or {}
        self.group_blocks, self.grouped_from = group_blocks or {}, grouped_from
        self.lengths = [0] * rows
        self.longest = [0] * rows
        """The most tokens each row ever held: what a ring has overwritten stays overwritten."""
        self.tokens_written = 0
        self.pages: list[list[int]] = [[] for _ in range(rows)]
        self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.active = torch.ones(rows, dtype=torch.int32, device=device)
        """1 = the row decodes in the next step; 0 = it keeps what it has."""
        self.step_lens = torch.zeros_like(self.seq_lens)
        self.listed_at = torch.full_like(self.seq_lens, -1)
        """Where kept selections of a row begin to serve (`selection.reuse_steps`), in tokens; -1: there are none."""
        self.kept_lists: list[torch.Tensor] = []
        """Those selections, [rows, ...] each; whoever keeps some adds them, and they follow a row that moves."""
        self.version = 0
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.uploader = Uploader(device)
        self.full: dict[int, FullLayer] = {}
        self._carried: dict[int, tuple[Any, ...]] = {}
        """What a layer keeps while its tables are made anew; here, so that a second try after a full device has it."""
        self.sliding = {
            s.layer_idx: SlidingLayer(s, rows=rows, block_size=block_size, dtype=dtype, device=device)
            for s in specs
            if s.is_sliding
        }
        self._closed = False
        self._allocate(max_blocks, capacity)

    def _allocate(self, max_blocks: int, capacity: int) -> None:
        """Create host table, pools and tables for `max_blocks`; heat and counters of an earlier size are kept."""
        old_table = getattr(self, "host_table", None)
        self.max_blocks, self.capacity, self.sharing_rows = max_blocks, capacity, self.rows
        self.version += 1
        self.host_table = torch.full((self.rows, max_blocks), -1, dtype=torch.int32, device=self.device)
        if old_table is not None:
            self.host_table[:, : old_table.shape[1]] = old_table
        for spec in self.specs:
            if spec.is_sliding:
                continue
            assert self.store is not None
            i = spec.layer_idx
            layout = self.page.blocks[i]
            kind, width, value_width = self.summaries[i]
            old = self.full.pop(i, None)
            if old:
                self._carried[i] = (old.heat, old.counters, old.traffic, old.by_page)
            del old  # its pool goes before the new one comes
            shape = (spec.num_kv_heads, layout.elements)
            layer = FullLayer(
                spec,
                layout,
                self.store.layer_view(self.page.layer_offsets[i], shape, self.dtype),
                rows=self.rows,
                max_blocks=max_blocks,
                capacity=capacity,
                summary_kind=kind,
                summary_width=width,
                value_width=value_width,
                max_pages=self._pages_to_cover(),
                device=self.device,
                bias_units=self.bias_units.get(i, 0),
                group_blocks=self.group_blocks.get(i, 0) if max_blocks >= self.grouped_from else 0,
            )
            carried = self._carried.get(i)
            if carried:
                heat, layer.counters, layer.traffic, by_page = carried
                layer.heat[..., : heat.shape[2]] = heat
                for new, had in zip(layer.by_page, by_page, strict=True):
                    pages = min(len(had), len(new))  # both cover every page that is held
                    new[:pages] = had[:pages]
            self.full[i] = layer
            self._carried.pop(i, None)
            if carried:
                self._bound_groups(layer)

    def _bound_groups(self, layer: FullLayer) -> None:
        """Write the bounds of all groups: while a table was short, steps may have ranked every block and kept none."""
        for row, tokens in enumerate(self.lengths):
            complete_groups(layer, self.host_table, row, 0, tokens)

    def _pages_to_cover(self) -> int:
        held = max((max(p) for p in self.pages if p), default=0)
        assert self.store is not None
        return max(min(self.rows * self.max_blocks + 1, self.store.max_pages), held + 1)

    # ---- growing ---------------------------------------------------------------------------------------------------

    def blocks_of(self, tokens: int) -> int:
        """Return the blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def grow(self, max_blocks: int, capacity: int) -> None:
        """Make room for `max_blocks` per row with `capacity` slots; everything resident is dropped."""
        self._allocate(max_blocks, capacity)

    def reserve(self, row_tokens: Sequence[int]) -> None:
        """Hold host pages for `row_tokens[b]` tokens of every row; all rows or none.

        Raises:
            HostMemoryError: the store cannot hold them; nothing changed.
            OutOfMemoryError: no device memory for their summaries; no page is held.
        """
        if self.store is None:
            return
        wanted = [max(0, self.blocks_of(n) - len(p)) for n, p in zip(row_tokens, self.pages, strict=True)]
        if not any(wanted):
            return
        fresh = self.store.allocate(sum(wanted))
        try:
            self._cover_pages(max(fresh) + 1)
        except BaseException:  # a page whose summary has no place must not be held
            self.store.release(fresh)
            raise
        row_ids: list[int] = []
        block_ids: list[int] = []
        at = 0
        for row, n in enumerate(wanted):
            row_ids += [row] * n
            block_ids += range(len(self.pages[row]), len(self.pages[row]) + n)
            self.pages[row] += fresh[at : at + n]
            at += n
        index = self.upload([row_ids, block_ids, fresh], torch.int64)
        self.host_table[index[0], index[1]] = index[2].int()

    def upload(self, values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Bring host values to the device behind the work queued so far; the host does not wait."""
        return self.uploader.upload(values, dtype)

    def _cover_pages(self, max_pages: int) -> None:
        for layer in self.full.values():
            self.version += layer.cover_pages(max_pages)

    def advance_host(self, tokens: Sequence[int]) -> None:
        """Advance the host clock by `tokens[b]` tokens per row."""
        self.lengths = [n + t for n, t in zip(self.lengths, tokens, strict=True)]
        self.longest = [max(pair) for pair in zip(self.longest, self.lengths, strict=True)]
        self.tokens_written += sum(tokens)

    def before_decode(self, rows: Sequence[int] | None = None) -> None:
        """Make sure of pages for the token that each row in `rows` (None: all) gets in the next step."""
        takes = self._takes(rows)
        full = (
            t and len(p) * self.block_size <= n
            for t, n, p in zip(takes, self.lengths, self.pages, strict=True)
        )
        if any(full):
            ahead = PAGES_AHEAD * self.block_size
            limit = self.max_blocks * self.block_size
            self.reserve(
                [min(n + ahead, limit) if t else n for t, n in zip(takes, self.lengths, strict=True)]
            )

    def after_decode(self, rows: Sequence[int] | None = None) -> None:
        """Advance the host clock by the token that each row in `rows` (None: all) was given."""
        self.advance_host([int(t) for t in self._takes(rows)])

    def _takes(self, rows: Sequence[int] | None) -> list[bool]:
        chosen = range(self.rows) if rows is None else frozenset(rows)
        return [row in chosen for row in range(self.rows)]

    def begin_decode(self, rows: int) -> None:
        """Device part of a decode step over the first `rows` rows (captured with it): the clock and the step number."""
        lens, active = self.seq_lens[:rows], self.active[:rows]
        lens += active
        torch.mul(lens, active, out=self.step_lens[:rows])
        self.step += 1

    def tables(self, rows: slice) -> StepTables:
        """Return what a decode step over `rows` reads."""
        return StepTables(self.step_lens[rows], self.host_table[rows], self.step)

    def set_device_lengths(self, rows: slice = slice(None)) -> None:
        """Bring the device clock of `rows` to the host's (after a prefill chunk, a crop or a reorder)."""
        self.seq_lens[rows] = self.upload(self.lengths[rows])

    # ---- rows become other rows ------------------------------------------------------------------------------------

    def reorder(self, source_rows: Sequence[int]) -> None:
        """Make row i a copy of row `source_rows[i]`.

        Closed pages are shared by reference; the open page of a row that moved is copied, because both rows go on
        writing to theirs. Residency of the rows that changed is dropped: their blocks are read from the host again.

        Raises:
            HostMemoryError: no room for the copies of the open pages; nothing changed.
        """
        source = list(source_rows)
        if len(source) != self.rows or not all(0 <= s < self.rows for s in source):
            raise CacheError(f"reorder needs {self.rows} row numbers below {self.rows}, not {source}")
        moved = [row for row, s in enumerate(source) if s != row]
        if not moved:
            return
        index = torch.tensor(source, device=self.device)
        if self.store is not None:
            self._share_pages(source, moved)
        self.lengths = [self.lengths[s] for s in source]
        self.longest = [self.longest[s] for s in source]
        self.set_device_lengths()
        changed = torch.tensor(moved, device=self.device)
        self.listed_at[changed] = -1
        for layer in self.full.values():
            for kept in layer.by_row:
                kept.copy_(kept[index])
            residency.drop_rows(layer, changed)
        for ring in self.sliding.values():
            ring.reorder(index)

    def _share_pages(self, source: list[int], moved: list[int]) -> None:
        assert self.store is not None
        synchronize(self.device)  # write-through of the pages about to be copied has landed
        used = [self.blocks_of(n) for n in self.lengths]
        opened = [row for row in moved if self.lengths[source[row]] % self.block_size]
        copies = dict(zip(opened, self.store.allocate(len(opened)), strict=True))
        pages = []
        for row, s in enumerate(source):
            if s == row:
                pages.append(self.pages[row])
                continue
            shared = self.pages[s][: used[s] - 1] if row in copies else self.pages[s][: used[s]]
            self.store.retain(shared)
            if row in copies:
                self._copy_page(self.pages[s][used[s] - 1], copies[row])
            pages.append(shared + ([copies[row]] if row in copies else []))
        for row in moved:
            self.store.release(self.pages[row])
        self.pages = pages
        self._write_table(moved)

    def _copy_page(self, source: int, target: int) -> None:
        assert self.store is not None
        self.store.copy_page(source, target)
        self._cover_pages(target + 1)
        for layer in self.full.values():
            for kept in layer.by_page:
                kept[target] = kept[source]

    def _write_table(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.host_table[row] = -1
            self.host_table[row, : len(self.pages[row])] = self.upload(self.pages[row])

    def release_row(self, row: int) -> None:
        """Empty a row: its pages go back to the store and nothing of it stays resident.

        Work in flight may still write to the row's pages: give them to others only through work queued behind it.
        """
        if self.store is not None:
            self.store.release(self.pages[row])
        self.pages[row] = []
        self._forget(row)

    def move_row(self, source: int, target: int) -> None:
        """Make the empty row `target` what `source` is, and empty `source`. Its blocks are read from the host again.

        Raises:
            CacheError: `target` holds something.
        """
        if self.lengths[target] or self.pages[target]:
            raise CacheError(f"row {target} is not empty: it holds {self.lengths[target]} tokens")
        for held in (self.lengths, self.longest):
            held[target] = held[source]
        self.pages[target], self.pages[source] = self.pages[source], []
        for table in (self.seq_lens, self.active, self.host_table, self.listed_at, *self.kept_lists):
            table[target] = table[source]
        for layer in self.full.values():
            for kept in layer.by_row:
                kept[target] = kept[source]
        for ring in self.sliding.values():
            ring.move(source, target)
        self._forget(source)

    def _forget(self, row: int) -> None:
        self.lengths[row] = self.longest[row] = 0
        for table in (self.seq_lens, self.active):
            table[row] = 0
        self.host_table[row] = -1
        self.listed_at[row] = -1
        one = torch.arange(row, row + 1, device=self.device)
        for layer in self.full.values():
            layer.heat[row] = 0.0
            residency.drop_rows(layer, one)

    def share_slots(self, rows: int) -> None:
        """Deal all slots out anew to the first `rows` rows; nothing is resident afterwards."""
        for layer in self.full.values():
            layer.share_slots(rows)
        self.sharing_rows = rows
        self.capacity = min((layer.capacity for layer in self.full.values()), default=self.capacity)

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every row.

        Raises:
            CacheError: a row is shorter than that, or a sliding layer no longer holds what would become visible.
        """
        if tokens == 0:
            return
        if tokens < 0 or tokens > min(self.lengths):
            raise CacheError(f"cannot drop {tokens} tokens of a row of {min(self.lengths)}")
        shorter = [n - tokens for n in self.lengths]
        for ring in self.sliding.values():
            slack = ring.ring_tokens - (ring.spec.window or 0)
            for n, longest in zip(shorter, self.longest, strict=True):
                if longest > ring.ring_tokens and longest - n > slack:
                    raise CacheError(
                        f"cannot go back {longest - n} tokens: layer {ring.spec.layer_idx} keeps only {slack} beyond "
                        "its window"
                    )
        self._drop_pages(shorter)
        self.lengths = shorter
        self.set_device_lengths()
        self.listed_at.fill_(-1)
        first_absent = torch.tensor([self.blocks_of(n) for n in self.lengths], device=self.device)
        for layer in self.full.values():
            residency.drop_from(layer, first_absent)
            beyond = torch.arange(self.max_blocks, device=self.device) >= first_absent[:, None]
            layer.heat.masked_fill_(beyond[:, None, :], 0.0)

    def _drop_pages(self, lengths: Sequence[int]) -> None:
        """Make every page at or behind each row's new end the row's own: a shared open page is copied, shared later
        ones are let go.

        Raises:
            HostMemoryError: no room for the copies; nothing changed.
        """
        store = self.store
        if store is None:
            return

        def is_shared(row: int, block: int) -> bool:
            return block < len(self.pages[row]) and store.refcount(self.pages[row][block]) > 1

        opened = [
            row
            for row, n in enumerate(lengths)
            if n % self.block_size and is_shared(row, n // self.block_size)
        ]
        fresh = store.allocate(len(opened))
        if opened:
            synchronize(self.device)  # write-through of the pages about to be copied has landed
        for row, copy in zip(opened, fresh, strict=True):
            block = lengths[row] // self.block_size
            self._copy_page(self.pages[row][block], copy)
            store.release([self.pages[row][block]])
            self.pages[row][block] = copy
        for row, n in enumerate(lengths):
            kept = self.blocks_of(n)
            while kept < len(self.pages[row]) and not is_shared(row, kept):
                kept += 1
            store.release(self.pages[row][kept:])
            del self.pages[row][kept:]
        self._write_table(range(self.rows))

    # ---- upkeep ----------------------------------------------------------------------------------------------------

    def drop_blocks(self, fraction: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Drop a random share of the resident blocks that are neither sink nor tail: forced misses."""
        for layer in self.full.values():
            residency.drop_blocks(
                layer, self.seq_lens, sink_blocks=self.sink_blocks, fraction=fraction, generator=generator
            )

    def check_integrity(self) -> None:
        """Check that both clocks agree and every table is consistent. Waits for the device; for tests and idle time."""
        assert self.seq_lens.tolist() == self.lengths, (
            f"clocks differ: {self.seq_lens.tolist()} and {self.lengths}"
        )
        for row, pages in enumerate(self.pages):
            assert self.host_table[row, : len(pages)].tolist() == pages, f"row {row}: host_table is stale"
        for layer in self.full.values():
            residency.check_integrity(layer, self.seq_lens)
        if self.store is not None:
            self.store.check_integrity()

    @property
    def device_bytes(self) -> int:
        """Device memory of the cache."""
        full = sum(layer.device_bytes for layer in self.full.values())
        return full + sum(ring.device_bytes for ring in self.sliding.values()) + self.host_table.nbytes

    @property
    def host_bytes(self) -> int:
        """Host memory of the pages this cache holds (a shared page counts once)."""
        return len({p for pages in self.pages for p in pages}) * self.page.page_bytes

    def close(self) -> None:
        """Give every page back. The cache cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        if self.store is not None:
            for pages in self.pages:
                self.store.release(pages)
        self.pages = [[] for _ in range(self.rows)]
        self.full.clear()
        self._carried.clear()
        self.sliding.clear()
