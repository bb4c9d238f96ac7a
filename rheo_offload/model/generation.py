"""`model.generate` of an offloaded model: our prefill, then a decoding loop over our cache.

The cache then holds the prompt but for its last `decode_tail_tokens` tokens, which go through the decode path. Greedy
search and sampling run in our loop (`decode_loop.py`), from captured steps on a GPU; everything else that `generate`
can do (processors, stopping criteria, beams, drafts) stays transformers' business, on the same cache.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import GenerationMode

from rheo_offload.errors import CacheError, NonFiniteError, RheoError
from rheo_offload.execution.sampler import SamplingParams
from rheo_offload.metrics.clock import RunClock
from rheo_offload.model.decode_loop import DecodeLoop, has_sampler, sampling_of, stepper_of, why_not_sampled
from rheo_offload.model.prefill import prefill_rows

logger = logging.getLogger("rheo_offload")

# Options that make `generate` choose another method than greedy search or sampling, or that need its tokenizer.
OTHER_MODES = (
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "num_beam_groups",
    "stop_strings",
)

REFUSED = {
    "cache_implementation": "an offloaded model has one cache, in host memory",
    "prefill_chunk_size": "set prefill.chunk_tokens in the configuration instead",
}


class _LogitsWatch(LogitsProcessor):
    """Remembers, on the device, whether any logits so far were unusable."""

    def __init__(self) -> None:
        self.bad: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # masked tokens are -inf on purpose; NaN, +inf or a row without any finite logit are not
        bad = (torch.isnan(scores) | torch.isposinf(scores)).any() | torch.isneginf(scores).all(-1).any()
        self.bad = bad if self.bad is None else self.bad | bad
        return scores


class _StopWatch(StoppingCriteria):
    """Notes the time of every token, and stops the loop on bad logits through the flags that the loop reads anyway."""

    def __init__(self, clock: RunClock, logits: _LogitsWatch) -> None:
        self._clock, self._logits = clock, logits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._clock.tick()
        stop = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return stop if self._logits.bad is None else stop | self._logits.bad


def rheo_generate(
    self: Any,
    inputs: torch.Tensor | None = None,
    *,
    past_key_values: Any = None,
    decode_tail_tokens: int = 1,
    allow_longer: bool = False,
    rheo_progress: Callable[[int, int], None] | None = None,
    **kwargs: Any,
) -> Any:
    """Generate as `transformers.GenerationMixin.generate`, with the keys and values in host memory.

    Args:
        inputs: [B, P] prompt ids (or `input_ids=`), left-padded when the rows differ in length.
        past_key_values: a cache of this model with an earlier turn; a new one when None.
        decode_tail_tokens: how many of the prompt's last tokens are fed one by one through the sparse decode path
            instead of the exact dense prefill; at least 1.
        allow_longer: go beyond the positions the model was made for.
        rheo_progress: called with (tokens done, tokens in all) during prefill.
        kwargs: whatever `generate` takes.

    Raises:
        CacheError: a foreign cache, or a prompt shorter than what the cache holds.
        RheoError: too long for the model, or an option that cannot be combined with an offloaded cache.
        NonFiniteError: the model produced NaN or infinite logits; the message names the step.
    """
    handle = self.rheo
    for name, why in REFUSED.items():
        if kwargs.get(name) is not None:
            raise RheoError(f"generate({name}=...) does not work on an offloaded model: {why}")
    stock = type(self).generate
    ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    if ids is None or kwargs.get("inputs_embeds") is not None:
        raise RheoError("generate on an offloaded model takes token ids (input_ids), not embeddings")
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise RheoError(f"the prompt is empty: input_ids has shape {list(ids.shape)}")
    if _option(self, kwargs, "use_cache") is False:
        return stock(self, ids, **kwargs)
    sequences = _option(self, kwargs, "num_return_sequences") or 1
    repeats = max(sequences, _option(self, kwargs, "num_beams") or 1)
    length = _final_length(self, kwargs, ids.shape[1])
    _check_positions(handle.max_positions, length, allow_longer)
    rows_ids = ids.repeat_interleave(repeats, 0)
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = kwargs["attention_mask"] = _infer_mask(self, kwargs, ids)

    fresh = past_key_values is None
    cache = handle.new_cache() if fresh else handle.check_cache(past_key_values)
    if cache.hf_length >= ids.shape[1]:
        raise CacheError(f"the cache holds {cache.hf_length} tokens, the prompt only {ids.shape[1]}")
    cache.expect(length)
    cache.clock.start(int(mask.sum()), ids.shape[0] * sequences)
    try:
        if _is_assisted(self, kwargs):
            logger.warning("drafts are verified by dense passes over the whole history, without selection")
        else:
            # every row keeps a token for the prefill, so that padding never reaches the decode path
            tail = max(1, min(decode_tail_tokens, int(mask.sum(1).min()) - 1))
            prompt_end = max(ids.shape[1] - tail, cache.hf_length)
            prefill_rows(
                self,
                cache,
                rows_ids[:, :prompt_end],
                mask.repeat_interleave(repeats, 0)[:, :prompt_end],
                chunk_tokens=handle.config.prefill.chunk_tokens,
                progress=rheo_progress,
                repeats=repeats,
            )
            _feed_tail(self, cache, rows_ids[:, prompt_end:-1])
        if length == ids.shape[1]:
            return ids.repeat_interleave(sequences, 0)
        return _run_stock(self, stock, cache.clock, ids, cache, kwargs)
    except Exception:
        if fresh:
            cache.close()  # nobody else can reach it
        raise


def sampling_params(model: Any, *, max_new_tokens: int, **options: Any) -> SamplingParams:
    """Return what `model.generate(**options)` does to choose tokens, for requests of an engine.

    What is not among the options comes from the model's generation_config, as in `generate`. (The engine reads the
    end tokens from there by itself.)

    Args:
        model: offloaded or not.
        max_new_tokens: of a request.
        options: of `generate`: do_sample, temperature, top_k, top_p, repetition_penalty and the like.

    Raises:
        RheoError: they ask for something an engine does not do; the message names it.
    """
    config, _ = model._prepare_generation_config(None, **options)
    model._prepare_special_tokens(config, True, device=model.device)
    mode = config.get_generation_mode()
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device=model.device)
    why = why_not_sampled(processors, ordered=config.do_sample)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        why = f"it has no {mode.value.replace('_', ' ')}"
    elif config.stop_strings:
        why = "it has no stop_strings"
    if why is not None:
        raise RheoError(
            f"an engine cannot do what these options, or the model's generation_config, ask for: {why}; use "
            "model.generate, or switch it off"
        )
    return SamplingParams(
        max_new_tokens=max_new_tokens, **(sampling_of(processors) if config.do_sample else {})
    )


def _is_assisted(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether drafts are verified: that loop of transformers wants to read the whole prompt itself, in one piece."""
    return kwargs.get("assistant_model") is not None or bool(
        _option(model, kwargs, "prompt_lookup_num_tokens")
    )


def _feed_tail(model: Any, cache: Any, ids: torch.Tensor) -> None:
    """Feed prompt tokens [B, n] one by one through the decode path; what the steps choose is not used."""
    if ids.shape[1] == 0:
        return
    stepper = stepper_of(model, cache) if has_sampler(model) else None
    with torch.no_grad(), model._optimize_model_for_decode():
        for i in range(ids.shape[1]):
            token = ids[:, i : i + 1]
            if stepper is not None:
                stepper.ids.copy_(token)
                stepper.launch()
            else:
                positions = torch.tensor(cache.executor.cache.lengths, device=ids.device)[:, None]
                model(token, position_ids=positions, past_key_values=cache, logits_to_keep=1)


def _run_stock(
    model: Any, stock: Any, clock: RunClock, ids: torch.Tensor, cache: Any, kwargs: dict[str, Any]
) -> Any:
    watch = _LogitsWatch()
    processors = LogitsProcessorList([watch, *(kwargs.pop("logits_processor", None) or [])])
    criteria = StoppingCriteriaList(
        [*(kwargs.pop("stopping_criteria", None) or []), _StopWatch(clock, watch)]
    )
    beams = _option(model, kwargs, "num_beams") or 1
    if beams == 1 and not any(_option(model, kwargs, name) for name in OTHER_MODES):
        kwargs.setdefault(
            "custom_generate", DecodeLoop(cache, clock, _LogitsWatch, _StopWatch, kwargs.get("streamer"))
        )
    out = stock(
        model, ids, past_key_values=cache, logits_processor=processors, stopping_criteria=criteria, **kwargs
    )
    if watch.bad is not None and bool(watch.bad):
        raise NonFiniteError(
            f"the model's logits were not finite at new token {clock.ticks}; generation stopped"
        )
    made = (out if torch.is_tensor(out) else out.sequences)[:, ids.shape[1] :]
    pad = _option(model, kwargs, "pad_token_id")
    clock.finish(made.numel() if pad is None else int((made != pad).sum()))
    return out


def _option(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return a generation option from the call, its generation_config, or the model's."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = kwargs.get("generation_config")
    value = getattr(given, name, None) if given is not None else None
    return value if value is not None else getattr(model.generation_config, name, None)


def _final_length(model: Any, kwargs: dict[str, Any], prompt: int) -> int:
    """Return the longest the sequences can get, in tokens."""
    new = _option(model, kwargs, "max_new_tokens")
    if new is not None:
        return prompt + int(new)
    length = _option(model, kwargs, "max_length")
    return max(int(length), prompt + 1) if length is not None else prompt + 20


def _check_positions(positions: int | None, length: int, allow_longer: bool) -> None:
    if positions is not None and length > positions and not allow_longer:
        raise RheoError(
            f"prompt and new tokens make {length} positions, {length - positions} more than the {positions} this model "
            "was made for; shorten them, or insist with allow_longer"
        )


def _infer_mask(model: Any, kwargs: dict[str, Any], ids: torch.Tensor) -> torch.Tensor:
    """Guess the mask as transformers does: leading pad tokens are padding when pad is not also an end token."""
    pad, eos = _option(model, kwargs, "pad_token_id"), _option(model, kwargs, "eos_token_id")
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return ((ids == pad).long().cumprod(1) == 0).long()
