"""One CUDA graph per batch bucket: a step is run eagerly until its kernels are compiled, then captured, then replayed.

The step is a function of the number of rows it covers. It launches the same work every time and leaves everything that
changes in device memory, so a graph of it stays valid while requests join, grow and leave. What does end a graph's life
is a change of the memory it points to; whoever owns that memory counts such changes (`version`).

The graphs of all buckets share one memory pool: they never run at the same time.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from rheo_offload.device import capture_stream, current_stream, is_cuda, on_stream, synchronize
from rheo_offload.errors import GraphError

logger = logging.getLogger("rheo_offload")

Step = Callable[[int, Hashable], None]

EAGER_STEPS = 2
"""Steps of a bucket before its capture: the first compiles kernels, the second runs without first-time allocations."""


def buckets_for(rows: int) -> tuple[int, ...]:
    """Return the batch buckets up to `rows`: the powers of two below it, and `rows` itself."""
    if rows < 1:
        raise ValueError(f"a batch has at least one row, not {rows}")
    powers = [1 << i for i in range(rows.bit_length()) if 1 << i < rows]
    return (*powers, rows)


def covering(rows: int, buckets: Sequence[int]) -> int | None:
    """Return the smallest of the ascending `buckets` that covers `rows`; None when none does."""
    return next((bucket for bucket in buckets if bucket >= rows), None)


@dataclass(slots=True)
class _Bucket:
    eager_steps: int = 0
    graph: "torch.cuda.CUDAGraph | None" = None
    reason: str | None = None
    """Why this bucket is not captured."""


@dataclass(slots=True)
class GraphRunner:
    """Runs steps, as graphs where that is possible.

    Args:
        device: where they run; on the CPU every step is eager.
        buckets: numbers of rows to capture for, ascending; the last one is the most a step can cover.
        enabled: False: every step is eager.
        on_capture: told (rows, "capturing" | "captured" | reason) around every capture.
    """

    device: torch.device
    buckets: tuple[int, ...]
    enabled: bool = True
    on_capture: Callable[[int, str], None] | None = None
    captures: int = 0
    """Graphs captured so far, those of earlier versions included."""
    _graphs: dict[tuple[int, Hashable], _Bucket] = field(default_factory=dict)
    _version: Hashable = None
    _pool: Any = None

    def bucket_of(self, rows: int) -> int:
        """Return the smallest bucket that covers `rows`.

        Raises:
            GraphError: more rows than the largest bucket.
        """
        bucket = covering(rows, self.buckets)
        if bucket is None:
            raise GraphError(
                f"a step of {rows} rows is larger than the largest batch bucket, {self.buckets[-1]}"
            )
        return bucket

    def run(
        self, step: Step, rows: int, variant: Hashable = None, *, version: Hashable, eager: bool = False
    ) -> int:
        """Run one step over at least `rows` rows; returns how many it covered.

        Args:
            step: launches a step over the first `rows` rows, of a variant: the same launches every time; never waits.
            rows: rows that must take part.
            variant: which of several steps (greedy or sampling, say); each has graphs of its own.
            version: of the memory the step uses; when it changes, every graph is captured anew.
            eager: run this one step eagerly whatever is captured (a step that measures more than usual).
        """
        bucket = self.bucket_of(rows)
        if eager or not self.enabled or not is_cuda(self.device):
            step(bucket, variant)
            return bucket
        if version != self._version:
            self._forget(version)
        if self.why_eager(rows, variant):  # a larger bucket that was captured serves as well
            bucket = min((b for b, v in self.captured if v == variant and b >= rows), default=bucket)
        state = self._graphs.setdefault((bucket, variant), _Bucket())
        if state.graph is None and state.reason is None and state.eager_steps >= EAGER_STEPS:
            self._capture(step, bucket, variant, state)
        if state.graph is not None:
            state.graph.replay()
        else:
            state.eager_steps += 1
            step(bucket, variant)
        return bucket

    def why_eager(self, rows: int, variant: Hashable = None) -> str | None:
        """Return why steps of this size are not replayed; None when they are, or will be."""
        if not is_cuda(self.device):
            return f"a {self.device.type} has no graphs"
        if not self.enabled:
            return "execution.graph is off"
        state = self._graphs.get((self.bucket_of(rows), variant))
        return state.reason if state else None

    @property
    def captured(self) -> list[tuple[int, Hashable]]:
        """The (rows, variant) that are captured now."""
        return [key for key, state in self._graphs.items() if state.graph is not None]

    def close(self) -> None:
        """Let every graph go, once the last replay is done: it runs in memory that a graph owns."""
        try:
            if self.captured:
                synchronize(self.device)
        finally:
            self._graphs.clear()
            self._pool = None

    def _forget(self, version: Hashable) -> None:
        if any(state.graph is not None for state in self._graphs.values()):
            logger.info("tables or pools were allocated anew: the decode step is captured again")
        self.close()
        self._version = version

    def _capture(self, step: Step, bucket: int, variant: Hashable, state: _Bucket) -> None:
        self._tell(bucket, "capturing")
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize(self.device)
            with self._recording(graph):
                step(bucket, variant)
        except RuntimeError as error:
            state.reason = _why_broken(error)
            logger.warning("batch of %d runs eagerly: %s", bucket, state.reason)
        else:
            state.graph, self.captures = graph, self.captures + 1
        self._tell(bucket, state.reason or "captured")

    @contextmanager
    def _recording(self, graph: Any) -> Iterator[None]:
        """Record the body into `graph`; raises what broke it, not the error that ending a broken capture adds."""
        pool, first = self._pool, None
        try:
            # thread_local: another thread may go on registering host memory meanwhile
            # on_stream: a capture that breaks leaves its own stream behind as the current one
            with (
                on_stream(current_stream(self.device)),
                torch.cuda.graph(
                    graph, pool=pool, stream=capture_stream(self.device), capture_error_mode="thread_local"
                ),
            ):
                try:
                    yield
                except BaseException as error:
                    first = error
                    raise
        except BaseException as error:
            mend_torch(self.device, pool)
            self._pool = None  # where torch thinks the old one is still being filled, it cannot be used again
            if first is None or first is error:
                raise
            raise first from None
        finally:
            del first  # its frames hold this one

    def _tell(self, bucket: int, what: str) -> None:
        logger.info("decode step for a batch of %d: %s", bucket, what)
        if self.on_capture is not None:
            self.on_capture(bucket, what)


def mend_torch(device: torch.device, pool: Any) -> None:
    """Make torch notice that a capture into `pool`, which broke, is over.

    Up to version 2.11 it does not (pytorch/pytorch pull request 180395): the allocator takes the capture for still
    under way, gives no cached memory back when the device is full and refuses every later capture, and nothing random
    can be drawn on the device.
    """
    allocator: Any = torch.cuda.memory
    with suppress(RuntimeError):  # the allocator knew, and the graph gives its share in the pool back
        allocator._cuda_endAllocateToPool(device.index or 0, pool)
        allocator._cuda_releasePool(device.index or 0, pool)
    with suppress(RuntimeError), on_stream(current_stream(device)):  # a capture that succeeds does the rest
        graph, place = torch.cuda.CUDAGraph(), torch.empty(1, device=device)
        with torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local"):
            place.zero_()


def _why_broken(error: RuntimeError) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return "no device memory left to capture it; lower cache.device_memory or the batch"
    return f"the step cannot be captured: {text}"
