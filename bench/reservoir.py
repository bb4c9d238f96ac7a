"""Random keys and values in host pages, written once and lent to the caches of a run.

Filling a context takes seconds, and several subjects at several batch sizes want the same. The reservoir is a cache
whose pages are filled through the append ops; a row of another cache of the same model retains as many of its pages
as it needs, as a shared prefix would, and gets open pages of its own behind them. When the rows need more pages than
there are, they begin again from the front: what is read from the host is the same, its home is not.
"""

import torch

from bench.ours import Rheo
from rheo_offload.cache.group_bounds import complete_groups
from rheo_offload.cache.host_store import HostStore
from rheo_offload.cache.kv_cache import KVCache

ROWS = 8  # of the caches that fill it
TINY = (
    "cache.device_memory=floor", "cache.capacity_ratio=1.0", "selection.sink_blocks=1", "selection.recent_blocks=1",
    "selection.dense_layers=[]",
)  # fmt: skip


class Reservoir:
    """Filled pages of one offloaded model."""

    def __init__(self, owner: Rheo, open_pages: int) -> None:
        """Prepare an empty one.

        Args:
            owner: its model and host store are used; it needs no cache.
            open_pages: low page numbers to keep for the rows' own pages, so that summaries need not reach far.
        """
        self.model, self.config = owner.model, owner.config
        self.open_pages = open_pages
        self.pages: list[int] = []
        self._spare: list[int] = []
        self._fillers: list[Rheo] = []
        self._summaries: list[dict[int, list[torch.Tensor]]] = []
        self._ids: list[torch.Tensor] = []

    def ensure(self, pages: int) -> None:
        """Hold at least this many filled pages, rounded up to whole rows.

        Raises:
            HostMemoryError: the host store cannot.
        """
        missing = pages - len(self.pages)
        if missing <= 0:
            return
        size = self.config.cache.block_size
        per_row = -(-missing // ROWS)
        filler = Rheo(
            self.model,
            self.config.with_overrides([*TINY, f"selection.token_budget={2 * size}"]),
            shared=self.model,
        )
        filler.cache = filler.new_cache(ROWS, per_row * size)
        executor = filler.cache.open(ROWS, per_row * size, self.model.dtype, self.model.device)
        store = executor.cache.store
        assert store is not None
        self._hold_spare(store)
        filler.write_random(ROWS, per_row * size)
        kv = executor.cache
        pages = sorted(page for row in kv.pages for page in row)
        self.pages += pages
        ids = torch.tensor(pages)
        self._ids.append(ids)
        self._summaries.append(
            {i: [kept[ids.to(kv.device)].cpu() for kept in layer.by_page] for i, layer in kv.full.items()}
        )
        kv.full.clear()  # only the pages are needed from now on
        self._fillers.append(filler)

    def _hold_spare(self, store: HostStore) -> None:
        """Own as many of the lowest pages as rows may be given; those that came back are taken again."""
        missing = self.open_pages - len(self._spare)
        if missing > 0:
            self._spare += store.allocate(min(missing, store.pages_free))
        self._spare.sort()
        store.release(self._spare[self.open_pages :])
        del self._spare[self.open_pages :]

    def lend(self, kv: KVCache, tokens: int, longest: int) -> int:
        """Make every row of an empty cache hold `tokens` tokens (whole blocks); nothing is resident afterwards.

        Each row also gets pages of its own, up to `longest` tokens.

        Returns:
            The number of rows whose pages are all different; further ones repeat them.
        """
        blocks, store = tokens // kv.block_size, kv.store
        assert store is not None and tokens % kv.block_size == 0 and blocks <= len(self.pages)
        total, own = len(self.pages), kv.blocks_of(longest) - blocks
        self._hold_spare(store)
        for row in range(kv.rows):
            mine = [self.pages[(row * blocks + i) % total] for i in range(blocks)]
            store.retain(mine)
            kv.pages[row] = mine + self._spare[:own]
            del self._spare[:own]
            kv.lengths[row] = kv.longest[row] = tokens
        kv._write_table(range(kv.rows))
        kv.set_device_lengths()
        kv._cover_pages(1 + max(max(row) for row in kv.pages))
        lent = torch.tensor(sorted({page for row in kv.pages for page in row[:blocks]}))
        for ids, summaries in zip(self._ids, self._summaries, strict=True):
            used = torch.isin(ids, lent)
            target = ids[used].to(kv.device)
            for i, by_page in summaries.items():
                layer = kv.full[i]
                for kept, summary in zip(layer.by_page, by_page, strict=True):
                    kept[target] = summary[used].to(kv.device)
                layer._views.clear()
        for layer in kv.full.values():
            for row in range(kv.rows):
                complete_groups(layer, kv.host_table, row, 0, tokens)
        return min(kv.rows, max(1, total // blocks))

    def close(self) -> None:
        """Let the pages go."""
        for filler in self._fillers:
            filler.close()
        if self._spare:
            self.model.rheo._store.release(self._spare)
        self._fillers, self.pages, self._spare, self.open_pages = [], [], [], 0
