"""Continuous batching over one offloaded model: requests join, stream their tokens and leave while others decode.

One iteration (`Engine.step`):

    admit     requests that fit get a row and host pages
    prefill   one piece of one prompt
    launch    one decode step of every running row: a replayed graph of the batch bucket
    read      the tokens of the step before, while this one runs; what ended leaves
    tidy      rows move together, and the device's slots are shared out anew, when the batch changed enough

Nothing is captured again when requests join, leave or grow: rows, lengths and pages are device data.
"""

import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch

from rheo_offload.engine.request import Request, State
from rheo_offload.engine.scheduler import Scheduler
from rheo_offload.errors import EngineError, HostMemoryError, NonFiniteError, RequestError
from rheo_offload.execution.graph import buckets_for
from rheo_offload.execution.sampler import SamplingParams, largest_vocabulary
from rheo_offload.model.decode_loop import has_sampler
from rheo_offload.model.prefill import prefill_piece
from rheo_offload.model.stepper import MAX_STOP_IDS, Stepper

logger = logging.getLogger("rheo_offload")

SETTLE_STEPS = 32
"""Steps that the batch must stay small for before rows move together and the slots of absent rows go to present ones.
Both mean that blocks are read again from the host, which must pay for itself."""


class Engine:
    """Serves requests with an offloaded model. Calls come from one thread."""

    def __init__(
        self,
        model: Any,
        *,
        max_rows: int,
        max_context_tokens: int,
        allow_overtaking: bool = False,
        on_capture: Callable[[int, str], None] | None = None,
    ) -> None:
        """Take the memory for `max_rows` rows of up to `max_context_tokens` tokens.

        Args:
            model: an offloaded model.
            max_rows: requests that decode at once. A step that finds no device memory halves them for good.
            max_context_tokens: longest request, prompt and new tokens.
            allow_overtaking: as `Scheduler`.
            on_capture: told (rows, what) around every graph capture, for progress.

        Raises:
            EngineError: the model is not offloaded, was made for fewer positions, or has a vocabulary that the sampler
                does not take.
            DeviceMemoryError, HostMemoryError: the rows do not fit; nothing is held.
        """
        handle = model.__dict__.get("rheo")
        if handle is None:
            raise EngineError("the model is not offloaded; call offload(model, config) first")
        if handle.max_positions is not None and max_context_tokens > handle.max_positions:
            raise EngineError(
                f"max_context_tokens of {max_context_tokens} is more than the {handle.max_positions} positions this "
                "model was made for"
            )
        if not has_sampler(model):
            raise EngineError(
                f"the model has more tokens than the {largest_vocabulary()} that an engine chooses from; use "
                "model.generate"
            )
        self.model, self.max_rows, self.max_context_tokens = model, max_rows, max_context_tokens
        self._allow_overtaking, self._on_capture = allow_overtaking, on_capture
        self._ids = count()
        self._why_closed = ""
        self._open()

    def _open(self) -> None:
        """Allocate cache, stepper and scheduler; what an earlier set held was given back before."""
        model, rows = self.model, self.max_rows
        self.cache = model.rheo.new_cache(max_length=self.max_context_tokens)
        self._ex = self.cache.open(rows, self.max_context_tokens, model.dtype, model.device)
        self._kv = self._ex.cache
        self._kv.active.zero_()
        self.stepper = Stepper.over(model, self.cache, retire=True, on_capture=self._on_capture)
        store = self._kv.store
        self.scheduler = Scheduler(
            rows,
            buckets_for(rows),
            self._kv.block_size,
            self.max_context_tokens,
            (lambda: store.pages_free) if store is not None else (lambda: rows * self._kv.max_blocks),
            allow_overtaking=self._allow_overtaking,
        )
        self.cache.clock.start(0, 0)
        self._in_flight: deque[tuple[int, list[tuple[int, Request]]]] = deque()
        self._interrupted: BaseException | None = None
        self._steps_with_fewer = 0
        self.steps = 0

    # ---- requests ----------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int] | torch.Tensor,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        on_token: Callable[[Request, int], None] | None = None,
    ) -> Request:
        """Queue a request; it runs while `step` is called.

        Args:
            prompt_ids: token ids of the prompt.
            params: how tokens are chosen and what ends the request.
            request_id: a name of its own; a number when None.
            on_token: called with (request, token) for every new token, in order, from within `step`. It may submit and
                cancel; what it raises fails its request.

        Raises:
            RequestError: it can never run (too long, an empty prompt, a token the model does not have, an id in use).
            EngineError: more stop tokens than a step compares with, or the engine is closed.
        """
        if self._why_closed:
            raise EngineError(self._why_closed)
        request = Request(
            id=str(next(self._ids)) if request_id is None else request_id,
            prompt_ids=torch.as_tensor(
                prompt_ids, dtype=torch.int64, device="cpu"
            ).clone(),  # the caller's may change
            params=params or SamplingParams(),
            eos_token_ids=_end_tokens(self.model),
            on_token=on_token,
        )
        if len(request.stop_ids) > MAX_STOP_IDS:
            raise EngineError(
                f"request {request.id!r} has {len(request.stop_ids)} stop tokens; at most {MAX_STOP_IDS}"
            )
        tokens, vocabulary = request.prompt_ids, self.model.get_input_embeddings().weight.shape[0]
        unknown = tokens[(tokens < 0) | (tokens >= vocabulary)].tolist()
        if unknown:  # on a GPU it would take everybody's requests with it
            raise RequestError(
                f"request {request.id!r} has token {unknown[0]}; the model has {vocabulary} tokens"
            )
        self.scheduler.submit(request)
        return request

    def cancel(self, request_id: str) -> bool:
        """End a request, waiting or running; returns whether there was one of this id."""
        row_of = {r.id: r.row for r in self.scheduler.active}
        if self.scheduler.cancel(request_id) is None:
            return False
        row = row_of.get(request_id)
        if row is not None:
            self._release(row)
        return True

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended and its last tokens were read."""
        return self.scheduler.is_idle and not self._in_flight

    def run(self) -> None:
        """Step until every request has ended."""
        while not self.is_idle:
            self.step()

    def generate(
        self, prompts: Sequence[Sequence[int] | torch.Tensor], params: SamplingParams | None = None
    ) -> list[list[int]]:
        """Answer all prompts; returns the new tokens of each.

        Raises:
            RequestError: a prompt can never run; none was queued.
            EngineError: a step failed; what had finished before is lost with the rest.
        """
        requests: list[Request] = []
        try:
            for prompt in prompts:
                requests.append(self.submit(prompt, params))
            self.run()
        except BaseException:  # nobody waits for the answers any more
            for request in requests:
                self.cancel(request.id)
            raise
        failed = [r for r in requests if r.error is not None]
        if failed:
            raise EngineError(f"request {failed[0].id!r} failed: {failed[0].error}") from failed[0].error
        return [r.output_ids for r in requests]

    # ---- one iteration -----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one iteration; returns whether anything is left to do.

        Raises:
            EngineError: the step failed, or the one before was interrupted. Every request that had a row has failed
                with it (the message has their ids). Waiting ones are kept, and the engine can go on; unless the device
                cannot be used any more: then they have failed too, and the message says to restart the process.
        """
        if self._why_closed:
            raise EngineError(self._why_closed)
        if self._interrupted is not None:
            self._recover(self._interrupted)
        try:
            self._iterate()
        except Exception as error:
            self._recover(error)
        except BaseException as interrupt:  # Ctrl-C: nobody knows how far the step came
            self._interrupted = interrupt
            raise
        return not self.is_idle

    def _iterate(self) -> None:
        admitted = self.scheduler.admit()
        for request in admitted:
            self._admit(request)
        if self.scheduler.waiting and not (admitted or self.scheduler.active):
            self._fail_first_waiting()
        piece = self.scheduler.next_chunk(self.model.rheo.config.prefill.chunk_tokens)
        if piece is not None:
            self._prefill(*piece)
        rows = [(request.row, request) for request in self.scheduler.active if request.state is State.RUNNING]
        if rows:
            with self.model._optimize_model_for_decode():  # mixtures of experts: a form that can be captured
                number = self.stepper.launch([row for row, _ in rows])  # type: ignore[misc]
            self._in_flight.append((number, rows))  # type: ignore[arg-type]
            self.steps += 1
        if self._in_flight and (len(self._in_flight) > 1 or not rows):
            self._read()
        self._tidy()

    def _admit(self, request: Request) -> None:
        kv, row = self._kv, request.row
        assert row is not None
        tokens = [len(pages) * kv.block_size for pages in kv.pages]
        tokens[row] = request.total_tokens
        try:
            kv.reserve(tokens)
        except HostMemoryError as error:  # pages in the address range, but no memory behind them
            self._end(request, error=error)
            return
        self.cache.clock.prompt_tokens += request.prompt_tokens
        self.cache.clock.rows += 1
        if row >= kv.sharing_rows:
            self._share(self._rows_in_use())
        if request.state is State.RUNNING:  # a prompt of one token
            self._start(request)

    def _fail_first_waiting(self) -> None:
        """Fail a request that does not fit although nothing runs: waiting longer would change nothing."""
        request = self.scheduler.waiting[0]
        why = (
            f"request {request.id!r} needs {self.scheduler.pages_of(request)} host pages and does not get them though "
            "no other request runs: other caches of this model hold them; close those or raise cache.host_memory"
        )
        self.scheduler.fail(request, HostMemoryError(why))

    def _prefill(self, request: Request, start: int, end: int) -> None:
        row = request.row
        assert row is not None
        ids = self._kv.upload(request.prompt_ids[start:end], torch.int64)[None]
        prefill_piece(self.model, self.cache, row, ids, start, last=end == request.prefill_tokens)
        self.scheduler.prefilled(request, end)
        if request.state is State.RUNNING:
            self._ex.warm(slice(row, row + 1))
            self._start(request)

    def _start(self, request: Request) -> None:
        """Let the request's row take part in the following steps."""
        assert request.row is not None
        self.stepper.start_row(
            request.row,
            last_token=int(request.prompt_ids[-1]),
            max_new_tokens=request.params.max_new_tokens,
            stop_ids=sorted(request.stop_ids),
            params=request.params,
        )

    def _read(self) -> None:
        """Hand the oldest unread step's tokens to their requests."""
        number, rows = self._in_flight.popleft()
        got = self.stepper.read(number)
        clock = self.cache.clock
        clock.tick()
        for row, request in rows:
            if request.is_done:
                if request.finish_reason in (
                    "stop",
                    "length",
                ):  # in the step before: this one left its row alone
                    self._kv.tokens_written -= 1
                continue
            if got.bad[row]:
                where = (
                    f"request {request.id!r}: logits not finite at new token {len(request.output_ids) + 1}"
                )
                self._end(request, error=NonFiniteError(where))
                continue
            clock.finish((clock.new_tokens or 0) + 1)
            try:
                reason = request.add_token(int(got.tokens[row]))
            except Exception as error:  # of its `on_token`: no business of the others
                if not request.is_done:
                    self._end(request, error=error)
                continue
            if reason is not None and not request.is_done:
                self._end(request, reason=reason)

    def _end(self, request: Request, *, reason: Any = None, error: Exception | None = None) -> None:
        row = request.row
        assert row is not None
        if error is not None:
            self.scheduler.fail(request, error)
        else:
            self.scheduler.finish(request, reason)
        self._release(row)

    def _release(self, row: int) -> None:
        """Empty a row, behind the step in flight (which may still touch it when the host ended the request)."""
        self._kv.release_row(row)
        self.stepper.sampler.clear_row(row)

    # ---- the batch changes -------------------------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Once the batch has stayed small: move rows together, give absent rows' slots to the present ones."""
        running = len(self.scheduler.running_rows)
        small = running > 0 and not self.scheduler.waiting
        fewer = small and self.stepper.runner.bucket_of(running) < self.scheduler.bucket()
        short = small and self._is_short_of_slots()
        self._steps_with_fewer = self._steps_with_fewer + 1 if fewer or short else 0
        if self._steps_with_fewer <= SETTLE_STEPS:
            return
        self._steps_with_fewer = 0
        for source, target in self.scheduler.compaction():
            self._kv.move_row(source, target)
            self.stepper.move_row(source, target)
            if target < self._kv.sharing_rows:
                self._ex.warm(slice(target, target + 1))
        if self._is_short_of_slots():
            self._share(self._rows_in_use())

    def _is_short_of_slots(self) -> bool:
        """Whether absent rows own slots that the longest present one could use."""
        kv = self._kv
        return self._rows_in_use() < kv.sharing_rows and kv.capacity < kv.blocks_of(max(kv.lengths))

    def _share(self, rows: int) -> None:
        """Deal the slots out to the first `rows` rows and load what they will want."""
        logger.debug("slots are shared by %d rows", rows)
        self._steps_with_fewer = 0
        self._kv.share_slots(rows)
        self._ex.warm(slice(0, rows))

    def _rows_in_use(self) -> int:
        """The batch bucket that covers every row in use, those that are prefilled included; 0 when none is."""
        top = max((r.row for r in self.scheduler.active if r.row is not None), default=-1) + 1
        return self.stepper.runner.bucket_of(top) if top else 0

    # ---- when something breaks ---------------------------------------------------------------------------------------

    def _recover(self, error: BaseException) -> None:
        """Fail what was running, start over with an empty cache, and raise what happened."""
        failed = list(self.scheduler.active)
        waiting = list(self.scheduler.waiting)
        for request in failed:
            self.scheduler.fail(request, error)
        names = ", ".join(repr(r.id) for r in failed) or "none"
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"a step failed ({first}); requests that ran: {names}"
        fewer = ""
        if isinstance(error, torch.OutOfMemoryError) and self.max_rows > 1:  # as many again would fail again
            self.max_rows = buckets_for(self.max_rows)[-2]
            fewer = f" with at most {self.max_rows} row(s)"
            logger.warning("a step found no device memory: at most %d rows from now on", self.max_rows)
        try:
            self.stepper.close()
            self.cache.close()
            _clear_frames(error)
            self._open()
        except Exception as fatal:  # an illegal access, say: every later call of the process fails as well
            for request in waiting:
                self.scheduler.fail(request, error)
            why = (str(fatal) or type(fatal).__name__).splitlines()[0]
            self._why_closed = f"{message}; the engine could not start over: {why}; restart the process"
            raise EngineError(self._why_closed) from error
        for request in waiting:
            self.scheduler.submit(request)
        raise EngineError(
            f"{message}; the engine goes on{fewer} with {len(waiting)} waiting request(s)"
        ) from error

    def stats(self) -> Any:
        """Return the figures of the cache since the engine started (`Stats`). Waits for the device."""
        return self.model.rheo.stats(self.cache)

    def close(self) -> None:
        """Give all memory back. Requests that have not ended are cancelled."""
        if self._why_closed:
            return
        self._why_closed = "this engine was closed; make a new one"
        for request in (*self.scheduler.waiting, *self.scheduler.active):
            self.scheduler.cancel(request.id)
        self.stepper.close()
        self.cache.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def stream(engine: Engine, request: Request) -> Iterator[int]:
    """Yield a request's tokens as they come, stepping the engine for everybody meanwhile.

    Raises:
        EngineError: the request failed.
    """
    given = 0
    while True:
        while given < len(request.output_ids):  # it may grow at every yield: others step the engine too
            given += 1
            yield request.output_ids[given - 1]
        if request.is_done:
            break
        engine.step()
    if request.error is not None:
        raise EngineError(f"request {request.id!r} failed: {request.error}") from request.error


def _clear_frames(error: BaseException | None) -> None:
    """Empty the frames that an error keeps alive: they hold pools whose memory is needed anew."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _end_tokens(model: Any) -> tuple[int, ...]:
    ids = model.generation_config.eos_token_id
    return () if ids is None else tuple(int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]))
