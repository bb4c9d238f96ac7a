"""Which request has which row, and what the engine does next. Host logic alone: no device, no clock.

    submit      a request joins the queue, or is refused at once
    admit       the head of the queue gets a row and its pages                      WAITING -> PREFILLING or RUNNING
    next_chunk  the piece of a prompt to prefill before the next decode step
    prefilled   that piece is done                                                  PREFILLING -> RUNNING
    compaction  rows move down so that a smaller batch bucket serves
    finish, cancel, fail   the row and the pages are free again                     -> FINISHED or FAILED

Host pages for the prompt and all new tokens are reserved at admission, so a running request never waits for memory. The
engine allocates them when `admit` returns the request and gives them back when it ends, before it calls `admit` or
`submit` again; so outside these calls `pages_free()` plus what is reserved is all the pages there are.
"""

from collections import deque
from collections.abc import Callable, Sequence

from rheo_offload.engine.request import FinishReason, Request, State
from rheo_offload.errors import RequestError
from rheo_offload.execution.graph import covering

Chunk = tuple[Request, int, int]


class Scheduler:
    """First in, first out, over a fixed number of rows."""

    def __init__(
        self,
        max_rows: int,
        buckets: Sequence[int],
        block_size: int,
        max_context_tokens: int,
        pages_free: Callable[[], int],
        *,
        allow_overtaking: bool = False,
    ) -> None:
        """Start empty.

        Args:
            max_rows: requests that run at once.
            buckets: batch sizes that a step can have, ascending (`execution.graph.buckets_for`).
            block_size: tokens of a host page.
            max_context_tokens: tokens that a row can hold, prompt and new ones.
            pages_free: host pages that nobody holds.
            allow_overtaking: a request that fits may pass one that waits for pages. Then a long one can starve.

        Raises:
            RequestError: more rows than the largest bucket.
            ValueError: buckets that are not ascending and positive, or nothing to schedule with.
        """
        if not buckets or buckets[0] < 1 or any(a >= b for a, b in zip(buckets, buckets[1:], strict=False)):
            raise ValueError(f"buckets must be positive and ascending, not {tuple(buckets)}")
        if min(max_rows, block_size, max_context_tokens) < 1:
            raise ValueError(
                f"rows, block size and context must be positive, not {max_rows}, {block_size}, {max_context_tokens}"
            )
        self.buckets = tuple(buckets)
        bucket_for(max_rows, self.buckets)
        self.max_rows, self.block_size, self.max_context_tokens = max_rows, block_size, max_context_tokens
        self.allow_overtaking, self._pages_free = allow_overtaking, pages_free
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []
        """Requests with a row, in the order of admission."""

    # ---- coming --------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            RequestError: it can never run, or its id is in use; nothing changed.
        """
        prompt, total = request.prompt_tokens, request.total_tokens
        who = f"request {request.id!r}"
        if request.state is not State.WAITING or any(
            request.id == r.id for r in (*self.waiting, *self.active)
        ):
            raise RequestError(f"{who} was submitted before; use a new id")
        if prompt == 0:
            raise RequestError(f"{who} has an empty prompt; give it at least one token")
        if prompt >= self.max_context_tokens:
            raise RequestError(
                f"{who} has {prompt} prompt tokens, but a row holds {self.max_context_tokens} and needs room for a new "
                "one; shorten the prompt or raise the context limit"
            )
        if total > self.max_context_tokens:
            raise RequestError(
                f"{who} needs {prompt} prompt + {request.params.max_new_tokens} new = {total} tokens, but a row holds "
                f"{self.max_context_tokens}; lower max_new_tokens to {self.max_context_tokens - prompt}"
            )
        pages, there = self.pages_of(request), self._pages_free() + self.pages_reserved
        if pages > there:
            raise RequestError(
                f"{who} needs {pages} host pages of {self.block_size} tokens, but the store has {there} in total; "
                "raise cache.host_memory, or lower max_new_tokens"
            )
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Give rows and pages to requests from the head of the queue on, as long as they fit; returns them in order."""
        admitted: list[Request] = []
        passed: list[Request] = []  # what waits for pages and lets others pass
        pages = self._pages_free()
        rows = self._free_rows()
        while self.waiting and rows:
            request = self.waiting[0]
            needed = self.pages_of(request)
            if needed > pages and not self.allow_overtaking:
                break
            self.waiting.popleft()
            if needed > pages:
                passed.append(request)
                continue
            pages -= needed
            request.row = rows.pop(0)
            request.state = State.PREFILLING if request.prefill_tokens else State.RUNNING
            self.active.append(request)
            admitted.append(request)
        self.waiting.extendleft(reversed(passed))
        return admitted

    # ---- running -------------------------------------------------------------------------------------------------

    def next_chunk(self, chunk_tokens: int) -> Chunk | None:
        """The next piece of a prompt: (request, first token, end), of the oldest that is not done; None without one.

        Changes nothing; call `prefilled` when the piece is computed.
        """
        if chunk_tokens < 1:
            raise ValueError(f"a chunk has at least one token, not {chunk_tokens}")
        for request in self.active:
            if request.state is State.PREFILLING:
                start = request.computed_tokens
                return request, start, min(start + chunk_tokens, request.prefill_tokens)
        return None

    def prefilled(self, request: Request, end: int) -> None:
        """Note that the prompt is computed up to `end`; the request runs once only its last token is left."""
        self._owned(request)
        if (
            request.state is not State.PREFILLING
            or not request.computed_tokens < end <= request.prefill_tokens
        ):
            raise RequestError(
                f"request {request.id!r} is {request.state.value} with {request.computed_tokens} of "
                f"{request.prefill_tokens} tokens prefilled; it cannot go to {end}"
            )
        request.computed_tokens = end
        if end == request.prefill_tokens:
            request.state = State.RUNNING

    @property
    def running_rows(self) -> list[int]:
        """Rows that take part in a decode step, ascending."""
        return sorted(self._row(r) for r in self.active if r.state is State.RUNNING)

    def bucket(self) -> int:
        """The smallest batch bucket that covers the running rows; 0 when none runs."""
        rows = self.running_rows
        return bucket_for(rows[-1] + 1, self.buckets) if rows else 0

    def compaction(self) -> list[tuple[int, int]]:
        """Move running rows down where a smaller bucket then serves; otherwise nothing moves.

        The requests have their new rows when this returns; the engine moves what belongs to them, in this order. Every
        target is free. Rows that are prefilled stay where they are.

        Returns:
            (from, to) pairs: requests in the order of their admission, to ascending free rows.
        """
        running = [r for r in self.active if r.state is State.RUNNING]
        bucket, free = self.bucket(), self._free_rows()
        for smaller in (b for b in self.buckets if b < bucket):
            above = [r for r in running if self._row(r) >= smaller]
            targets = [row for row in free if row < smaller]
            if len(above) <= len(targets):
                moves = [(self._row(r), to) for r, to in zip(above, targets, strict=False)]
                for request, (_, to) in zip(above, moves, strict=True):
                    request.row = to
                return moves
        return []

    # ---- going ---------------------------------------------------------------------------------------------------

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request that has a row; its row and pages are free again."""
        self._end(request, State.FINISHED, reason)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request, waiting or with a row, because of an error."""
        request.error = error
        self._end(request, State.FAILED, "error")

    def cancel(self, request_id: str) -> Request | None:
        """End the request of this id, waiting or with a row, and return it; None when there is none."""
        for request in (*self.waiting, *self.active):
            if request.id == request_id:
                self._end(request, State.FINISHED, "cancelled")
                return request
        return None

    def _end(self, request: Request, state: State, reason: FinishReason) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self._owned(request)
            self.active.remove(request)
        request.state, request.finish_reason, request.row = state, reason, None

    # ---- figures -------------------------------------------------------------------------------------------------

    def pages_of(self, request: Request) -> int:
        """Host pages for the prompt and all new tokens."""
        return -(-request.total_tokens // self.block_size)

    @property
    def pages_reserved(self) -> int:
        """Host pages of all requests with a row."""
        return sum(self.pages_of(r) for r in self.active)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing has a row."""
        return not self.waiting and not self.active

    def check_integrity(self) -> None:
        """Check rows, states and progress against each other.

        Raises:
            AssertionError: they disagree; the message names the request.
        """
        rows = [r.row for r in self.active]
        assert len(set(rows)) == len(rows), f"a row has two requests: {rows}"
        ids = [r.id for r in (*self.waiting, *self.active)]
        assert len(set(ids)) == len(ids), f"an id has two requests: {ids}"
        for r in self.waiting:
            assert r.state is State.WAITING and r.row is None and r.computed_tokens == 0, (
                f"{r.id} does not just wait"
            )
        for r in self.active:
            assert r.row is not None and 0 <= r.row < self.max_rows, f"{r.id} has row {r.row}"
            done = r.computed_tokens == r.prefill_tokens
            assert r.state is (State.RUNNING if done else State.PREFILLING), f"{r.id} is {r.state.value}"
            assert r.computed_tokens <= r.prefill_tokens, f"{r.id} computed more than its prompt"
        assert self._pages_free() >= 0, f"{self._pages_free()} pages are free"

    def _free_rows(self) -> list[int]:
        held = {r.row for r in self.active}
        return [row for row in range(self.max_rows) if row not in held]

    def _owned(self, request: Request) -> None:
        if request not in self.active:
            raise RequestError(f"request {request.id!r} is {request.state.value} and has no row")

    @staticmethod
    def _row(request: Request) -> int:
        assert request.row is not None
        return request.row


def bucket_for(rows: int, buckets: Sequence[int]) -> int:
    """Return the smallest of the ascending `buckets` that covers `rows` rows.

    Raises:
        RequestError: none does; the message names the largest batch that fits.
    """
    bucket = covering(rows, buckets)
    if bucket is None:
        raise RequestError(
            f"a batch of {rows} rows is larger than the largest bucket; at most {buckets[-1]} rows fit, "
            f"lower the batch or add a bucket of {rows}"
        )
    return bucket
