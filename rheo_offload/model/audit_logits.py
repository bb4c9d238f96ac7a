"""The audit's logit KL: after an audited step one row's token runs through the model again, attending to everything.

A hook on the model, so that every loop has it: the runtime's own steps (audited ones are never replayed), transformers'
loops, the engine. The second forward reads what the run has stored and writes nothing; the host waits for nothing.
"""

import inspect
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from rheo_offload.model.hf_cache import RheoCache


def watch_logits(model: Any) -> RemovableHandle:
    """Compare the logits of audited steps with those of dense decoding, until the returned handle is removed."""
    handle: RemovableHandle = model.register_forward_hook(_compare, with_kwargs=True)
    return handle


def _compare(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if args:
        kwargs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, RheoCache) or not (rows := cache.take_audited()):
        return
    ex = cache.executor
    row = ex.audit.row(rows)
    # a tuple begins with the loss where labels were given
    sparse = output[kwargs.get("labels") is not None] if isinstance(output, tuple) else output.logits
    # Not `model(...)`: what others hooked onto the model is meant for steps, and this is none. The step has stored its
    # token by now, so a caller that hears of a failure may not try it again on this cache.
    with torch.no_grad(), ex.broken_if_it_fails(), cache.attended_densely(row, rows):
        dense = model.forward(
            **_token_of(row, rows, cache, kwargs),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            logits_to_keep=1,
        ).logits
    ex.audit.record_logits(dense[0, -1], sparse[row.start, -1], ex.cache.step_lens[row.start] > 0)


def _token_of(row: slice, rows: int, cache: RheoCache, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the row's token and its position as the step had them."""
    token = {name: given[name][row] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None}
    positions = given.get("position_ids")
    if positions is None:  # the model counted them itself
        device = next(iter(token.values())).device
        positions = torch.full((1, 1), cache.get_seq_length() - 1, device=device)
    return token | {"position_ids": positions.expand(rows, -1)[row]}
