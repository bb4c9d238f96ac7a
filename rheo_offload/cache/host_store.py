"""Refcounted pages in host memory: the home of every KV block, from which the pool can be refilled."""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rheo_offload.cache.host_memory import GIB, OS_PAGE_BYTES, HostRange
from rheo_offload.device import host_free_bytes
from rheo_offload.errors import CacheError, HostMemoryError

SCRATCH_PAGE = 0
AUTO_SHARE = 0.8  # of the free host memory; the rest is left to the model, the tokenizer and the file cache


def host_budget(requested: Literal["auto"] | int) -> int:
    """Turn `cache.host_memory` into bytes.

    Args:
        requested: bytes, or "auto" for 80 % of the free host memory (control group limits included).

    Raises:
        ValueError: neither "auto" nor a positive number.
        HostMemoryError: more than is free.
    """
    free = host_free_bytes()
    if requested == "auto":
        return int(AUTO_SHARE * free)
    if not isinstance(requested, int) or requested < 1:
        raise ValueError(f"host memory must be 'auto' or a positive number of bytes, not {requested!r}")
    if requested > free:
        raise HostMemoryError(
            f"cache.host_memory asks for {requested / GIB:.2f} GiB and {free / GIB:.2f} GiB is free; "
            "lower it or use auto"
        )
    return requested


class HostStore:
    """Pages of `page_bytes` in one `HostRange`, each owned by as many requests as its reference count says.

    A page holds one logical block of one request, all layers and heads; what lies where inside it is the
    layout's business. Page 0 is scratch for inactive rows and is never given out. A freed page keeps its old
    bytes. The store knows nothing of work in flight: release a page only after the last kernel that could
    touch it. Calls come from one thread.

    Args:
        page_bytes: size of a page.
        max_pages: pages in the address range, the scratch page included.
        pin: register the memory with CUDA.
        growth_pages: how many pages beyond those needed are made usable at a time at most, so that growing is rare.
        tokens_per_page: only for messages: lets an error name the longest context that fits.
        touch_threads: see `HostRange`.

    Raises:
        HostMemoryError: the range cannot be reserved, or its first pages cannot be pinned.
    """

    def __init__(
        self,
        page_bytes: int,
        max_pages: int,
        *,
        pin: bool,
        growth_pages: int,
        tokens_per_page: int | None = None,
        touch_threads: int | None = None,
    ) -> None:
        if page_bytes < 1 or max_pages < 1 or growth_pages < 0:
            raise ValueError(
                f"page_bytes and max_pages must be positive and growth_pages not negative, "
                f"not {page_bytes}, {max_pages}, {growth_pages}"
            )
        self.page_bytes = page_bytes
        self.max_pages = max_pages
        self._growth_pages = growth_pages
        self._tokens_per_page = tokens_per_page
        self._references = np.zeros(max_pages, dtype=np.int64)
        self._freed: list[int] = []  # heap of the pages below _first_unused that nobody owns
        self._first_unused = SCRATCH_PAGE + 1
        # No page crosses the end of a registration, so any copy inside a page is one legal cudaMemcpy.
        self._range = HostRange(
            page_bytes * max_pages,
            pin=pin,
            step_bytes=math.lcm(page_bytes, OS_PAGE_BYTES),
            touch_threads=touch_threads,
        )
        try:
            self._make_usable(self._first_unused)
        except BaseException:
            self._range.close()
            raise

    @property
    def pages_in_use(self) -> int:
        """Pages that somebody owns; the scratch page is not among them."""
        return self._first_unused - 1 - len(self._freed)

    @property
    def pages_free(self) -> int:
        """Pages that `allocate` can still give out."""
        return self.max_pages - 1 - self.pages_in_use

    @property
    def bytes_in_use(self) -> int:
        return self.pages_in_use * self.page_bytes

    @property
    def bytes_usable(self) -> int:
        """Host memory really held (touched and, with `pin`, pinned): freed, scratch and spare pages too."""
        return self._range.usable_bytes

    def allocate(self, n: int) -> list[int]:
        """Give out `n` pages with one reference each, lowest free ids first; all or nothing.

        May block to touch and pin more memory (about 0.17 s a GiB).

        Returns:
            Page ids, ascending.

        Raises:
            HostMemoryError: not enough pages, or no memory for them. Nothing has changed.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if n > self.pages_free:
            raise HostMemoryError(self._full_message(n))
        reused = min(n, len(self._freed))
        end = self._first_unused + n - reused
        self._make_usable(end)
        pages = [heapq.heappop(self._freed) for _ in range(reused)]
        pages += range(self._first_unused, end)
        self._first_unused = end
        self._references[pages] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add one reference to each page, once per mention.

        Raises:
            CacheError: a page that nobody owns. Nothing has changed.
        """
        for page, count in self._counted(pages).items():
            self._references[page] += count

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference from each page, once per mention; a page without references is free again.

        Raises:
            CacheError: a page is released more often than it is owned. Nothing has changed.
        """
        counted = self._counted(pages)
        for page, count in counted.items():
            if count > self._references[page]:
                raise CacheError(
                    f"host page {page} released {count} times with {self._references[page]} references"
                )
        for page, count in counted.items():
            self._references[page] -= count
            if self._references[page] == 0:
                heapq.heappush(self._freed, page)

    def refcount(self, page: int) -> int:
        """How many owners the page has; more than one means copy before writing."""
        return int(self._references[page])

    def copy_page(self, src: int, dst: int) -> None:
        """Copy all bytes of one owned page to another, on the host. The device must be done writing `src`."""
        self._counted([src, dst])
        self._page(dst).copy_(self._page(src))

    def layer_view(self, byte_offset: int, shape_per_page: Sequence[int], dtype: torch.dtype) -> Tensor:
        """View one part of every page as a tensor, without a copy.

        Args:
            byte_offset: where the part starts inside a page.
            shape_per_page: its shape; it is contiguous inside the page.
            dtype: of the elements.

        Returns:
            [max_pages, *shape_per_page], page stride `page_bytes`. Its address never changes. Pages not given
            out yet may not be pinned, so a kernel must not touch them.

        Raises:
            ValueError: the part does not fit into a page or is not aligned to its elements.
        """
        item_bytes = dtype.itemsize
        part_bytes = math.prod(shape_per_page) * item_bytes
        if byte_offset < 0 or byte_offset + part_bytes > self.page_bytes:
            raise ValueError(
                f"{part_bytes} bytes at offset {byte_offset} do not fit into a page of {self.page_bytes}"
            )
        if byte_offset % item_bytes or self.page_bytes % item_bytes:
            raise ValueError(
                f"offset {byte_offset} and page size {self.page_bytes} must be multiples of {item_bytes}"
            )
        strides = [math.prod(shape_per_page[axis + 1 :]) for axis in range(len(shape_per_page))]
        elements = self._range.tensor[: self.max_pages * self.page_bytes].view(dtype)
        return elements.as_strided(
            (self.max_pages, *shape_per_page),
            (self.page_bytes // item_bytes, *strides),
            byte_offset // item_bytes,
        )

    def check_integrity(self) -> None:
        """Compare counts, free pages and usable memory with each other.

        Raises:
            CacheError: they disagree, which is a bug of this class or a write into its tables.
        """
        owned = {int(page) for page in np.flatnonzero(self._references)}
        freed = set(self._freed)
        given_out = set(range(1, self._first_unused))
        checks = {
            "a reference count is negative": bool((self._references < 0).any()),
            "the scratch page has an owner or is free": SCRATCH_PAGE in owned | freed,
            "a page is free twice": len(freed) != len(self._freed),
            "a page is free and owned": bool(freed & owned),
            "a page is lost or was never given out": freed | owned != given_out,
            "a page in use is not usable": self._range.usable_bytes < self._first_unused * self.page_bytes,
        }
        broken = [what for what, wrong in checks.items() if wrong]
        if broken:
            raise CacheError("host store: " + "; ".join(broken))

    def close(self) -> None:
        """Give all memory back at once; views made before read zeros from then on. May be called again."""
        self._range.close()

    def __enter__(self) -> "HostStore":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _make_usable(self, end: int) -> None:
        """Make the pages below `end` usable, and as many again up to `growth_pages`: a small run touches little."""
        if end * self.page_bytes > self._range.usable_bytes:
            ahead = min(self._growth_pages, end)
            self._range.ensure(min(end + ahead, self.max_pages) * self.page_bytes)

    def _page(self, page: int) -> Tensor:
        return self._range.tensor[page * self.page_bytes : (page + 1) * self.page_bytes]

    def _counted(self, pages: Sequence[int]) -> Counter[int]:
        counted = Counter(pages)
        for page in counted:
            if not 0 < page < self.max_pages or self._references[page] == 0:
                raise CacheError(f"host page {page} is not allocated")
        return counted

    def _full_message(self, n: int) -> str:
        need, free = n * self.page_bytes / GIB, self.pages_free * self.page_bytes / GIB
        message = f"{n} host pages ({need:.2f} GiB) needed, {self.pages_free} ({free:.2f} GiB) free"
        if self._tokens_per_page is not None:
            message += f": room for {self.pages_free * self._tokens_per_page} more tokens over all rows"
        return message + "; raise cache.host_memory, or lower the context or the batch"
