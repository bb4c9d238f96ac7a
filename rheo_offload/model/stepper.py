"""Decode steps of an offloaded model: its forward, the choice of the next token and what ends a row, as one step.

    launch   host part (pages, host clock), then the step: a replayed graph, or the same launches one by one
    read     the tokens of an earlier step, once they have arrived

Nothing in a step waits for the device, and the host reads one step late: while it looks at the tokens of one step the
next one is running. So the step itself knows what ends a row (`stop_ids`, `remaining`).
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rheo_offload.device import Event, current_stream, empty_pinned, event
from rheo_offload.errors import CacheError, GraphError
from rheo_offload.execution.graph import GraphRunner, buckets_for
from rheo_offload.execution.sampler import Sampler, SamplingParams
from rheo_offload.model.attention_hook import NAME
from rheo_offload.model.hf_cache import RheoCache

STEPS_IN_FLIGHT = 4
MAX_STOP_IDS = 16


@dataclass(frozen=True, slots=True)
class StepTokens:
    """What one step gave, per row."""

    tokens: np.ndarray
    """int64: the new token."""
    done: np.ndarray
    """bool: the row has ended, with this token or before it."""
    bad: np.ndarray
    """bool: the row's logits were unusable (NaN, or nothing finite) in this step or before."""


class Stepper:
    """Runs decode steps over the first rows of a cache. All rows of the cache share its device buffers."""

    def __init__(
        self,
        model: Any,
        cache: RheoCache,
        sampler: Sampler,
        *,
        graph: bool = True,
        retire: bool = False,
        prologue: Callable[[int], None] | None = None,
        on_capture: Callable[[int, str], None] | None = None,
    ) -> None:
        """Allocate the buffers of a step.

        Args:
            model: an offloaded model.
            cache: of this model, not empty.
            sampler: chooses tokens; has a row for every row of the cache.
            graph: replay CUDA graphs where possible.
            retire: a row that ends takes no part in later steps; otherwise it goes on with its padding token, as
                transformers' generate does.
            prologue: launched ahead of the forward, inside the step (benchmarks).
            on_capture: as `GraphRunner`.
        """
        # weak: the cache keeps its stepper, and must be freed with its last user
        self._model, self._cache, self.sampler = weakref.ref(model), weakref.ref(cache), sampler
        self.retire, self.prologue = retire, prologue
        kv = cache.executor.cache
        rows, device = kv.rows, kv.device
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.stop_ids = torch.full((rows, MAX_STOP_IDS), -1, dtype=torch.int64, device=device)
        self.pad_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.remaining = torch.full((rows,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.report = torch.zeros(rows, 3, dtype=torch.int64, device=device)
        self._arrived = empty_pinned(STEPS_IN_FLIGHT, rows, 3, dtype=torch.int64, device=device)
        self._events: list[Event] = [event(device) for _ in range(STEPS_IN_FLIGHT)]
        self.launched = 0
        self.runner = GraphRunner(device, buckets_for(rows), enabled=graph, on_capture=on_capture)
        self._weights = self._fingerprint()

    @classmethod
    def over(cls, model: Any, cache: RheoCache, **kwargs: Any) -> "Stepper":
        """Make a stepper with a sampler for the model's vocabulary and graphs as its configuration says.

        Args:
            model: an offloaded model.
            cache: of this model, not empty.
            kwargs: `retire`, `prologue`, `on_capture`.
        """
        kv = cache.executor.cache
        vocabulary = model.get_output_embeddings().weight.shape[0]
        sampler = Sampler(kv.rows, vocabulary, kv.device, cache.executor.ops)
        return cls(model, cache, sampler, graph=model.rheo.config.execution.graph != "off", **kwargs)

    @property
    def model(self) -> Any:
        """The model whose steps these are."""
        model = self._model()
        assert model is not None
        return model

    @property
    def cache(self) -> RheoCache:
        """The cache that the steps extend."""
        cache = self._cache()
        assert cache is not None
        return cache

    def launch(self, rows: Sequence[int] | None = None) -> int:
        """Queue one step for `rows` (None: all rows of the cache) and the copy of its tokens; returns its number.

        Raises:
            HostMemoryError: no page for a new token; nothing was queued.
            GraphError: the model changed since the stepper was made.
            CacheError: an earlier step or forward stopped half-way.
        """
        if self._fingerprint() != self._weights or self.model.config._attn_implementation != NAME:
            raise GraphError(
                "the model's dtype, device, weights or attention changed after its decode step was prepared; "
                "restore() and offload() it again"
            )
        ex = self.cache.executor
        if not ex.between_forwards:
            raise CacheError("an earlier step stopped half-way and the clocks disagree; start a new cache")
        ex.begin_decode_on_host(rows)
        top = ex.cache.rows if rows is None else max(rows) + 1
        with ex.broken_if_it_fails():
            self.runner.run(self._step, top, self._variant(top), version=ex.version, eager=ex.audit_now)
            ex.cache.after_decode(rows)
            if rows is None:
                self.cache.hf_length += 1
        number, place = self.launched, self.launched % STEPS_IN_FLIGHT
        self.launched += 1
        self._arrived[place].copy_(self.report, non_blocking=True)
        self._events[place].record(current_stream(self.ids.device))  # type: ignore[arg-type]
        return number

    def read(self, number: int) -> StepTokens:
        """Wait for step `number` and return what it gave. At most `STEPS_IN_FLIGHT` steps are kept."""
        if not self.launched - STEPS_IN_FLIGHT <= number < self.launched:
            raise ValueError(f"step {number} is not among the last {STEPS_IN_FLIGHT} of {self.launched}")
        place = number % STEPS_IN_FLIGHT
        self._events[place].synchronize()
        values = self._arrived[place].numpy().copy()
        return StepTokens(values[:, 0], values[:, 1] != 0, values[:, 2] != 0)

    def start_row(
        self,
        row: int,
        *,
        last_token: int,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        params: SamplingParams,
    ) -> None:
        """Let a prefilled row take part in the following steps, beginning with its prompt's last token.

        Args:
            row: whose keys and values are there for all but `last_token`.
            last_token: the next input.
            max_new_tokens: tokens after which the row ends.
            stop_ids: tokens that end it, at most `MAX_STOP_IDS`.
            params: how its tokens are chosen.
        """
        kv = self.cache.executor.cache
        stops = [*stop_ids, *[-1] * (MAX_STOP_IDS - len(stop_ids))]
        values = kv.upload([last_token, max_new_tokens, *stops], torch.int64)
        self.ids[row, 0], self.remaining[row], self.stop_ids[row] = values[0], values[1], values[2:]
        self.done[row] = False
        self.sampler.set_row(row, params)
        kv.active[row] = 1

    def move_row(self, source: int, target: int) -> None:
        """Make row `target` what row `source` is (the cache's own row is moved by `KVCache.move_row`)."""
        for table in (self.ids, self.stop_ids, self.pad_ids, self.remaining, self.done):
            table[target] = table[source]
        self.sampler.swap_rows(source, target)

    def close(self) -> None:
        """Let the graphs go."""
        self.runner.close()

    # ---- the step ----------------------------------------------------------------------------------------------------

    def _variant(self, rows: int) -> Hashable:
        return "greedy" if self.sampler.all_greedy(rows) else "sampling"

    def _step(self, rows: int, variant: Hashable) -> None:
        """Launch one step over the first `rows` rows. This is what a graph holds."""
        ex = self.cache.executor
        if self.prologue is not None:
            self.prologue(rows)
        ids, positions = self.ids[:rows], self.positions[:rows]
        positions.copy_(ex.cache.seq_lens[:rows, None])
        recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        undo = ex.abandoned_if_it_fails() if recording else nullcontext()
        with torch.no_grad(), undo, self.cache.driven(rows):
            logits = self.model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=self.cache,
                attention_mask=None,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        positions += 1  # of the token that is chosen now
        tokens = self.sampler(logits, positions[:, 0], greedy=variant == "greedy")
        self._commit(rows, tokens, self.sampler.bad[:rows])

    def _commit(self, rows: int, tokens: torch.Tensor, bad: torch.Tensor) -> None:
        """Make `tokens` [rows] the next input of the rows that took part, and note which rows they end."""
        active = self.cache.executor.cache.active[:rows]
        done, report = self.done[:rows], self.report[:rows]
        tokens = torch.where(done, self.pad_ids[:rows], tokens)
        ids = self.ids[:rows, 0]
        ids.copy_(torch.where(active != 0, tokens, ids))
        self.remaining[:rows] -= active
        ends = (tokens[:, None] == self.stop_ids[:rows]).any(1) | (self.remaining[:rows] <= 0)
        done |= ends & (active != 0)
        if self.retire:
            active *= ~done
        report[:, 0] = ids
        report[:, 1] = done
        report[:, 2] = bad

    def _fingerprint(self) -> tuple[Any, ...]:
        weight = self.model.get_input_embeddings().weight
        return weight.dtype, weight.device, weight.data_ptr()
