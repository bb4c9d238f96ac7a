"""One reserved range of host memory, touched and pinned step by step, whose base address never changes."""

import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rheo_offload.device import host_free_bytes
from rheo_offload.errors import CacheError, HostMemoryError

logger = logging.getLogger("rheo_offload")

GIB = 1 << 30
OS_PAGE_BYTES = mmap.PAGESIZE
TOUCH_SPAN_BYTES = 64 << 20
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named by the mmap module only in newer Pythons
REGISTER_PORTABLE_MAPPED = 0x1 | 0x2  # cudaHostRegisterPortable | cudaHostRegisterMapped


class HostRange:
    """An anonymous mapping of `max_bytes` of which the front part is usable and, if asked, pinned.

    The address range is reserved at once and costs nothing; `ensure` makes more of it real. Several threads
    touch new memory (most of the time goes into the kernel's zeroing of pages) while the part before it is
    registered with CUDA, so nothing is ever copied or held twice. The range must outlive the GPU work on it.

    Args:
        max_bytes: size of the range; rounded up to whole OS pages.
        pin: register the usable part with CUDA, so that the GPU reads and writes it directly. Needs CUDA.
        step_bytes: the usable part grows, and registrations end, at multiples of this (a multiple of the OS
            page size). A copy by `cudaMemcpy` must not cross the end of a registration; kernels may.
        touch_threads: threads that touch new memory; None: one per core, 16 at most.
        huge_pages: ask the kernel for transparent huge pages.

    Raises:
        HostMemoryError: the address range cannot be reserved.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        pin: bool,
        step_bytes: int = OS_PAGE_BYTES,
        touch_threads: int | None = None,
        huge_pages: bool = True,
    ) -> None:
        if max_bytes < 1 or step_bytes < 1 or step_bytes % OS_PAGE_BYTES:
            raise ValueError(
                f"max_bytes must be positive and step_bytes a multiple of {OS_PAGE_BYTES}, "
                f"not {max_bytes} and {step_bytes}"
            )
        self.max_bytes = _round_up(max_bytes, OS_PAGE_BYTES)
        self.pin = pin
        self._step_bytes = step_bytes
        self._chunk_bytes = max(step_bytes, GIB // step_bytes * step_bytes)
        self._touch_threads = touch_threads or min(16, os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._usable_bytes = 0
        self._registered: list[int] = []
        self._cudart = torch.cuda.cudart() if pin else None
        _free_stuck()
        mapping = _reserve(self.max_bytes, pin=pin, huge_pages=huge_pages)
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        self._tensor: Tensor | None = torch.from_numpy(self._bytes)
        self._finalizer = weakref.finalize(self, _free, mapping, self._registered, self._cudart)

    @property
    def tensor(self) -> Tensor:
        """uint8 [max_bytes]: the whole range without a copy, of which the first `usable_bytes` are pinned."""
        if self._tensor is None:
            raise CacheError("this host memory range is closed")
        return self._tensor

    @property
    def usable_bytes(self) -> int:
        """How much of the front of the range has been touched and, if asked for, registered."""
        return self._usable_bytes

    def ensure(self, nbytes: int) -> None:
        """Make at least the first `nbytes` usable; does nothing when they are already.

        Blocks: with 16 threads on an H100 host, touching and registering took 0.17 s a GiB. Must not run in a
        thread that is capturing a graph. Safe to call from several threads.

        Raises:
            HostMemoryError: more than the range or the free memory was asked for, or CUDA refused to pin it.
                What became usable before the refusal stays usable.
            CacheError: the range is closed.
        """
        with self._lock:
            base = self.tensor.data_ptr()
            if nbytes > self.max_bytes:
                raise HostMemoryError(
                    f"{_gib(nbytes)} of host memory asked for in a range of {_gib(self.max_bytes)}; "
                    "raise cache.host_memory"
                )
            target = min(_round_up(nbytes, self._step_bytes), self.max_bytes)
            if target > self._usable_bytes:
                self._check_free(target - self._usable_bytes)
                self._grow(base, target)

    def close(self) -> None:
        """Unregister everything and give the memory back at once. May be called again; also runs at exit.

        Waits for the device first, since work in flight may still read the range. Tensors made from the range
        stay safe to touch but hold nothing: they read zeros, and the addresses go away with the last of them.
        """
        with self._lock:
            self._tensor = None
            self._bytes = np.empty(0, dtype=np.uint8)
            self._usable_bytes = 0
            self._finalizer()

    def __enter__(self) -> "HostRange":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_free(self, nbytes: int) -> None:
        free = host_free_bytes()
        if nbytes > free:
            raise HostMemoryError(
                f"the host store needs {_gib(nbytes)} more and {_gib(free)} of host memory is free; "
                "lower cache.host_memory or the context, or free host memory"
            )

    def _grow(self, base: int, target: int) -> None:
        """Touch with all threads, in order, and register each chunk as soon as it is touched."""
        pool = ThreadPoolExecutor(self._touch_threads, thread_name_prefix="rheo-touch")
        try:
            chunks = [
                (
                    start,
                    stop,
                    [pool.submit(self._touch, *span) for span in _spans(start, stop, TOUCH_SPAN_BYTES)],
                )
                for start, stop in _spans(self._usable_bytes, target, self._chunk_bytes)
            ]
            for start, stop, touches in chunks:
                for touch in touches:
                    touch.result()
                if self._cudart is not None:
                    self._register(base + start, stop - start)
                self._usable_bytes = stop
        finally:
            pool.shutdown(cancel_futures=True)

    def _touch(self, start: int, stop: int) -> None:
        self._bytes[start:stop:OS_PAGE_BYTES] = 0  # numpy lets go of the GIL here

    def _register(self, address: int, nbytes: int) -> None:
        assert self._cudart is not None
        code = int(self._cudart.cudaHostRegister(address, nbytes, REGISTER_PORTABLE_MAPPED))
        if code != 0:
            _forget_cuda_error()
            raise HostMemoryError(
                f"CUDA refused to pin {_gib(nbytes)} of host memory (error {code}) with "
                f"{_gib(self._usable_bytes)} pinned and {_gib(host_free_bytes())} free; "
                "lower cache.host_memory, or raise the limit on locked memory "
                "(`ulimit -l`, or the container's memlock limit)"
            )
        self._registered.append(address)


def _reserve(nbytes: int, *, pin: bool, huge_pages: bool) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        mapping = mmap.mmap(-1, nbytes, flags=flags)
    except (OSError, OverflowError) as error:
        raise HostMemoryError(
            f"cannot reserve {_gib(nbytes)} of address space ({error}); lower cache.host_memory, or raise "
            "the limit on virtual memory (`ulimit -v`)"
        ) from error
    if huge_pages:
        with suppress(OSError):  # a kernel built without them refuses; ordinary pages work as well
            mapping.madvise(mmap.MADV_HUGEPAGE)
    if pin:
        mapping.madvise(mmap.MADV_DONTFORK)  # otherwise a fork would copy every pinned page
    return mapping


_stuck: list[tuple[mmap.mmap, list[int], Any]] = []
"""Mappings that could not be unregistered yet. Kept, as CUDA would refuse to register their addresses again."""


def _free(mapping: mmap.mmap, registered: list[int], cudart: Any) -> None:
    """Unregister and drop the pages now; the mapping itself lives until the last view of it is gone.

    The garbage collector may come here while a graph is captured, which no call to CUDA may disturb, and CUDA may
    refuse: the mapping is then kept, and its turn comes with the next range that is made.
    """
    if registered and _is_capturing():
        _stuck.append((mapping, registered, cudart))
        return
    if registered:
        with suppress(RuntimeError):  # the context may be broken or already gone at exit
            for device in range(torch.cuda.device_count()):  # the model's need not be the current one
                if torch.cuda.memory_reserved(device):
                    torch.cuda.synchronize(device)
    refused = []
    while registered:
        address = registered.pop()
        code = int(cudart.cudaHostUnregister(address))
        if code != 0:
            logger.warning("CUDA error %d while unpinning host memory", code)
            refused.append(address)
    if refused:
        _stuck.append((mapping, refused, cudart))
        return
    mapping.madvise(mmap.MADV_DONTNEED)


def _free_stuck() -> None:
    for _ in range(len(_stuck)):
        _free(*_stuck.pop(0))


def _is_capturing() -> bool:
    with suppress(RuntimeError):
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return False


def _forget_cuda_error() -> None:
    """Let a small kernel launch pick up the stale error code, which would surface in unrelated work."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + size, stop)) for at in range(start, stop, size))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
