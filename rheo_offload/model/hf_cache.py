"""The `transformers` cache that stands in front of ours.

`update` hands back only the new keys and values, tagged with where they came from; the attention function, which
has the mask, stores them. Lengths here are HF's: padding included, the same for all rows.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from rheo_offload.errors import CacheError
from rheo_offload.execution.dense_again import attend_again
from rheo_offload.execution.executor import Executor
from rheo_offload.metrics.clock import RunClock
from rheo_offload.model.padding import left_padding
from rheo_offload.types import AttentionCall, LayerSpec

TAG = "_rheo_source"
# Tokens assumed to follow the first forward when nobody says how long the rows will get; tables double from there.
UNKNOWN_NEW_TOKENS = 1024


class _Layer(CacheLayerMixin):
    """What transformers asks of one layer; everything is answered by the cache it belongs to."""

    is_compileable, is_croppable, supports_early_init = False, True, False

    def __init__(self, cache: "RheoCache", spec: LayerSpec) -> None:
        super().__init__()
        self._cache_ref, self.spec = (
            weakref.ref(cache),
            spec,
        )  # no cycle: a cache that is let go frees its memory at once
        self.is_sliding = spec.is_sliding

    @property
    def _cache(self) -> "RheoCache":
        cache = self._cache_ref()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key_states, value_states, self.spec.layer_idx)

    def get_seq_length(self, *args: Any) -> int:
        return self._cache.hf_length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        queries = query_length.shape[0] if torch.is_tensor(query_length) else query_length
        return self._cache.hf_length + queries, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self, *args: Any) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        raise CacheError("crop the whole cache, not one layer")


class RheoCache(Cache):
    """A KV cache in host memory for one batch. Made by `model.rheo.new_cache()` or by `model.generate` itself."""

    def __init__(
        self,
        model_id: int,
        specs: Sequence[LayerSpec],
        make_executor: Callable[[int, int, torch.dtype, torch.device], Executor],
        *,
        max_length: int | None = None,
    ) -> None:
        """Prepare a cache; memory is taken when the first tokens arrive and the number of rows is known.

        Args:
            model_id: identity of the model this cache belongs to.
            specs: its attention layers.
            make_executor: rows, longest row in tokens, dtype, device -> executor.
            max_length: longest row in tokens, prompt and new tokens; None grows on demand.
        """
        super().__init__(layers=[_Layer(self, spec) for spec in specs])
        self.model_id, self.max_length = model_id, max_length
        self.clock = RunClock()
        self._make_executor = make_executor
        self._executor: Executor | None = None
        self.hf_length = 0
        self.padding: list[int] = []
        self._rows: slice | None = None  # set while one row of the batch is prefilled alone
        self._driven: int | None = None  # set while a Stepper runs a step over that many rows
        self._audited = 0  # rows of the audited step whose logits are not compared yet
        self._again: tuple[slice, int] | None = None  # set while a row attends to everything
        self._closed = False
        self.stepper: Any = None
        """The captured steps over this cache (`stepper.Stepper`), once something was generated."""

    @property
    def executor(self) -> Executor:
        """The execution state.

        Raises:
            CacheError: nothing was stored yet, or the cache was closed.
        """
        if self._executor is None:
            raise CacheError("this cache was closed" if self._closed else "this cache holds nothing yet")
        return self._executor

    @property
    def is_empty(self) -> bool:
        """Whether no token was stored yet."""
        return self._executor is None

    def expect(self, tokens: int) -> None:
        """Say how long the rows will get, prompt and new tokens, so that memory is taken once and early."""
        self.max_length = max(self.max_length or 0, tokens)

    def open(self, rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Executor:
        """Take the memory for `rows` rows, once; `tokens` are about to come, and more unless `max_length` says so."""
        if self._closed:
            raise CacheError("this cache was closed; make a new one")
        if self._executor is None:
            length = self.max_length or tokens + UNKNOWN_NEW_TOKENS
            self._executor = self._make_executor(rows, length, dtype, device)
            weakref.finalize(self, self._executor.cache.close)
            self.padding = [0] * rows
        return self._executor

    # ---- what the model's forward calls ----------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tag the new keys [B, Hkv, Q, D] for the attention function and hand both back."""
        key_states = key_states.view_as(
            key_states
        )  # a fresh object: the tag must not stay on the model's tensor
        setattr(key_states, TAG, (self, layer_idx))
        return key_states, value_states

    def attend(self, layer_idx: int, call: AttentionCall, mask: torch.Tensor | None) -> torch.Tensor:
        """Store and attend one layer of a forward: returns [B, Hq, Q, D]."""
        if self._again is not None:
            return attend_again(self.executor, layer_idx, call, *self._again)
        if layer_idx == 0:
            self._begin(call, mask)
        return self.executor.forward(layer_idx, call)

    @contextmanager
    def driven(self, rows: int) -> Iterator[None]:
        """Let a forward be a decode step over the first `rows` rows whose host part was done by the caller."""
        self._driven = rows
        try:
            yield
        finally:
            self._driven = None

    def take_audited(self) -> int:
        """Return how many rows the decode step that just ran covers if it is audited, once; else 0."""
        rows, self._audited = self._audited, 0
        return rows

    @contextmanager
    def attended_densely(self, row: slice, rows: int) -> Iterator[None]:
        """Let a forward repeat the last step, over `rows` rows, for `row` alone: dense everywhere, storing nothing."""
        self._again = row, rows
        try:
            yield
        finally:
            self._again = None

    def _begin(self, call: AttentionCall, mask: torch.Tensor | None) -> None:
        if self._driven is not None:
            self.executor.begin_decode_on_device(self._driven)
            self._audited = self._driven if self.executor.audit_now else 0
            return
        batch, tokens = call.k.shape[0], call.k.shape[2]
        rows = self._rows or slice(0, batch)
        ex = self.open(batch, tokens, call.k.dtype, call.k.device)
        self._audited = 0
        if not ex.between_forwards:
            raise CacheError("an earlier forward stopped half-way and layers disagree; start a new cache")
        if self._rows is None and batch != ex.cache.rows:
            raise CacheError(f"this cache holds {ex.cache.rows} rows, the forward has {batch}")
        if tokens == 1 and self._rows is None and min(ex.cache.lengths) > 0:
            if mask is not None and mask.shape != (
                batch,
                self.hf_length + 1,
            ):  # its values are not read: no wait
                raise CacheError(
                    f"attention_mask must be [{batch}, {self.hf_length + 1}], not {list(mask.shape)}"
                )
            ex.begin_decode()
            self._audited = batch if ex.audit_now else 0
        else:
            if self._rows is None:
                self._set_padding(mask, batch, self.hf_length + tokens)
            held = (
                self.hf_length
                if self._rows is None
                else self.padding[rows.start] + ex.cache.lengths[rows.start]
            )
            ex.begin_prefill(rows, [held - p for p in self.padding[rows]], tokens)
        if self._rows is None:
            self.hf_length += tokens

    def _set_padding(self, mask: torch.Tensor | None, batch: int, total: int) -> None:
        """Read each row's left padding off the mask; anything but left padding is refused."""
        if mask is None:
            found = self.padding
        else:
            if mask.shape != (batch, total):
                raise CacheError(f"attention_mask must be [{batch}, {total}], not {list(mask.shape)}")
            found = left_padding(mask).tolist()
        for row, (old, new) in enumerate(zip(self.padding, found, strict=True)):
            if self.executor.cache.lengths[row] and old != new:
                raise CacheError(
                    f"row {row} began with {old} padding tokens; its attention_mask now has {new}"
                )
        self.padding = found

    # ---- what generation calls -------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens seen, padding included."""
        return self.hf_length

    def crop(self, max_length: int) -> None:
        """Drop `-max_length` tokens (or, the older meaning, keep `max_length`)."""
        if self.is_empty:
            return
        drop = -max_length if max_length <= 0 else self.hf_length - max_length
        if drop > 0:
            self.executor.cache.crop(drop)
            self.hf_length -= drop

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i a copy of row `beam_idx[i]` (beam search)."""
        if not self.is_empty:
            self.reorder_rows(beam_idx.tolist())

    def reorder_rows(self, source: Sequence[int]) -> None:
        """Make row i a copy of row `source[i]`."""
        self.executor.cache.reorder(source)
        self.padding = [self.padding[s] for s in source]

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise CacheError(
            "the number of rows of a cache is fixed; pass num_return_sequences to generate instead"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise CacheError("the number of rows of a cache is fixed; rows cannot be removed")

    def reset(self) -> None:
        raise CacheError(
            "a cache is not reused for another prompt; make a new one with model.rheo.new_cache()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "RheoCache":
        raise CacheError("a cache in host memory cannot be deep-copied; prefill a second one")

    def close(self) -> None:
        """Give host pages and device memory back. Idempotent."""
        self._closed = True
        if self.stepper is not None:
            self.stepper.close()
            self.stepper = None
        if self._executor is not None:
            self._executor.cache.close()
            self._executor = None
