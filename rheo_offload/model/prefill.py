"""Reading a prompt: row by row, without padding, in chunks, so that device memory does not grow with the prompt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from rheo_offload.errors import CacheError
from rheo_offload.execution.executor import Executor
from rheo_offload.model.attention_hook import NAME
from rheo_offload.model.hf_cache import RheoCache
from rheo_offload.model.padding import left_padding


def prefill_rows(
    model: PreTrainedModel,
    cache: RheoCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    chunk_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    warm: bool = True,
    repeats: int = 1,
) -> None:
    """Bring every row of a cache to `input_ids` [B, P]; what it already holds is skipped.

    Args:
        model: an offloaded model.
        cache: of this model.
        input_ids: the sequences so far, left-padded.
        attention_mask: [B, P], 0 on the left padding; None: no padding.
        chunk_tokens: tokens per forward pass.
        progress: called with (tokens done, tokens in all).
        warm: fill the pools at the end.
        repeats: every `repeats` neighbouring rows are the same prompt: the first is read, the others share its pages.
    """
    batch, total = input_ids.shape
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise CacheError(f"attention_mask is {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}")
    padding = [0] * batch if attention_mask is None else left_padding(attention_mask).tolist()
    ex = cache.open(batch, total, model.dtype, input_ids.device)
    if ex.cache.rows != batch:
        raise CacheError(f"this cache holds {ex.cache.rows} rows, the prompt has {batch}")
    held = ex.cache.lengths
    for row in range(batch):
        if held[row] and cache.padding[row] != padding[row]:
            raise CacheError(
                f"row {row} began with {cache.padding[row]} padding tokens, now it has {padding[row]}"
            )
        if held[row] > total - padding[row]:
            raise CacheError(
                f"the cache already holds {held[row]} tokens of row {row}, more than the prompt has"
            )
    shared = repeats if not any(held) else 1
    cache.padding = padding
    longest = max(
        total, cache.max_length or 0
    )  # pages for the new tokens too, so that a lack of memory shows now
    ex.make_room(longest)
    ex.cache.reserve([longest - p if row % shared == 0 else 0 for row, p in enumerate(padding)])
    work = [
        (row, at)
        for row in range(0, batch, shared)
        for at in range(padding[row] + held[row], total, chunk_tokens)
    ]
    done, tokens = 0, sum(total - padding[row] - held[row] for row in range(0, batch, shared))
    for row, at in work:
        end = min(at + chunk_tokens, total)
        prefill_piece(
            model, cache, row, input_ids[row : row + 1, at:end], at - padding[row], last=end == total
        )
        done += end - at
        if progress is not None:
            progress(done, tokens)
    cache.hf_length = total
    if shared > 1:
        cache.reorder_rows([row - row % shared for row in range(batch)])
        ex.cache.reserve([longest - p for p in padding])
    if warm and work:
        ex.warm()


def prefill_piece(
    model: PreTrainedModel, cache: RheoCache, row: int, ids: torch.Tensor, position: int, *, last: bool
) -> None:
    """Read `ids` [1, n], the tokens of one row from `position` on, on top of what the row holds.

    `last` says that decoding comes next: the last queries then tell which blocks it will want.
    """
    with _one_row(cache, cache.executor, row, last=last):
        _forward(model, cache, ids, position)


@contextmanager
def _one_row(cache: RheoCache, ex: Executor, row: int, *, last: bool) -> Iterator[None]:
    """Let one forward see a single row; only the last chunk of a row looks for the blocks decode will want."""
    cache._rows, ex.wants_heat = slice(row, row + 1), last
    try:
        yield
    finally:
        cache._rows, ex.wants_heat = None, True


def _forward(model: PreTrainedModel, cache: RheoCache, ids: torch.Tensor, position: int) -> None:
    if model.config._attn_implementation != NAME:  # it would see the new tokens only, without a word
        raise CacheError(
            f"the model's attention is {model.config._attn_implementation!r} since it was offloaded; restore() and "
            "offload() it again"
        )
    positions = torch.arange(position, position + ids.shape[1], device=ids.device)[None]
    with torch.no_grad():
        model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            attention_mask=None,
            use_cache=True,
            logits_to_keep=1,
        )
