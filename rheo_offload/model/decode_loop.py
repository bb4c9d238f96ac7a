"""The decoding loop behind `model.generate`: greedy and sampled tokens from captured steps, read one step late.

transformers prepares processors and criteria and hands them over (`custom_generate`). What this loop does not know runs
in transformers' own loop, eagerly, on the same cache, with one log line that says why.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rheo_offload.device import is_cuda
from rheo_offload.errors import NonFiniteError
from rheo_offload.execution.sampler import SamplingParams, largest_vocabulary
from rheo_offload.metrics.clock import RunClock
from rheo_offload.model.hf_cache import RheoCache
from rheo_offload.model.stepper import MAX_STOP_IDS, Stepper, StepTokens

logger = logging.getLogger("rheo_offload")

KEPT_ASIDE = (
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
)


@dataclass(slots=True)
class DecodeLoop:
    """What `generate` passes as `custom_generate`; transformers' arguments arrive at the call."""

    cache: RheoCache
    clock: RunClock
    own_logits: type[LogitsProcessor]
    """The processor that watches for bad logits in transformers' loop; this loop watches by itself."""
    own_criteria: type[StoppingCriteria]
    streamer: Any = None
    """Handed over here because transformers drops it on the way to a `custom_generate`."""

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Generate; arguments and result as `GenerationMixin._sample`."""
        why = self._why_not(model, logits_processor, stopping_criteria, generation_config)
        if why is not None:
            if why:
                logger.info("generate runs transformers' own loop, without graphs: %s", why)
            return model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=self.streamer,
                **model_kwargs,
            )
        stepper = self._prepare(model, input_ids, logits_processor, stopping_criteria, generation_config)
        with model._optimize_model_for_decode():  # mixtures of experts: a form that can be captured
            return self._run(stepper, input_ids, stopping_criteria)

    def _why_not(self, model: Any, processors: Any, criteria: Any, config: Any) -> str | None:
        """Why transformers' loop must run: a reason worth a log line, or an empty one; None when ours can."""
        stops = (self.own_criteria, MaxLengthCriteria, EosTokenCriteria, MaxTimeCriteria)
        odd = [type(c).__name__ for c in criteria if type(c) not in stops]
        if odd:
            return f"it has no {', '.join(odd)}"
        others = [p for p in processors if type(p) is not self.own_logits]
        if why := why_not_sampled(others, ordered=config.do_sample):
            return why
        if not has_sampler(model):
            return f"it takes {largest_vocabulary()} logits a row at most"
        asked = [name for name in KEPT_ASIDE if getattr(config, name, None)]
        if asked:
            return f"it keeps no {', '.join(asked)}"
        if len(_stop_ids(criteria)) > MAX_STOP_IDS:
            return f"it compares with {MAX_STOP_IDS} end tokens at most"
        graph = model.rheo.config.execution.graph != "off"
        if not graph or (config.do_sample and not is_cuda(model.device)):
            return ""  # nothing would be gained, and sampling draws what the stock model draws
        return None

    def _prepare(
        self, model: Any, input_ids: torch.Tensor, processors: Any, criteria: Any, config: Any
    ) -> Stepper:
        """Bring the cache's stepper, made once, to the state of this call."""
        stepper = stepper_of(model, self.cache)
        rows, device = input_ids.shape[0], input_ids.device
        params = sampling_of(processors) if config.do_sample else {}
        for row in range(rows):  # every row draws for itself: the seeds come from torch's generator
            stepper.sampler.set_row(row, SamplingParams(**params))
        stops = _stop_ids(criteria)
        stepper.stop_ids.fill_(-1)
        stepper.stop_ids[:, : len(stops)] = torch.tensor(stops, dtype=torch.int64, device=device)
        pad = config._pad_token_tensor
        stepper.pad_ids.fill_(int(pad) if pad is not None else 0)
        stepper.done.zero_()
        stepper.ids.copy_(input_ids[:, -1:])
        return stepper

    def _run(self, stepper: Stepper, input_ids: torch.Tensor, criteria: Any) -> torch.Tensor:
        lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
        limit = max(1, min(lengths) - input_ids.shape[1]) if lengths else None
        timers = [c for c in criteria if isinstance(c, MaxTimeCriteria)]
        in_flight: deque[int] = deque()
        columns: list[torch.Tensor] = []
        launched, stop = 0, False
        try:
            while not stop and (limit is None or len(columns) < limit):
                if limit is None or launched < limit:
                    in_flight.append(stepper.launch())
                    launched += 1
                    if len(in_flight) == 1 and launched != limit:
                        continue  # always one step ahead of what is read
                got = self._read(stepper, in_flight.popleft(), len(columns))
                columns.append(torch.from_numpy(got.tokens))
                stop = bool(got.done.all())
                stop = stop or any(time.time() - t.initial_timestamp > t.max_time for t in timers)
        finally:
            self.cache.crop(-len(in_flight))  # the step that ran too far never happened
        if self.streamer is not None:
            self.streamer.end()
        made = torch.stack(columns, 1) if columns else torch.empty(len(input_ids), 0, dtype=input_ids.dtype)
        return torch.cat([input_ids, made.to(input_ids)], 1)

    def _read(self, stepper: Stepper, number: int, index: int) -> StepTokens:
        """Read the step that made new token `index` and pass its tokens on."""
        got = stepper.read(number)
        self.clock.tick()
        if got.bad.any():
            raise NonFiniteError(
                f"the model's logits were not finite at new token {index + 1}; generation stopped"
            )
        if self.streamer is not None:
            self.streamer.put(torch.from_numpy(got.tokens))
        return got


def has_sampler(model: Any) -> bool:
    """Whether the sampler takes a vocabulary as large as this model's."""
    return bool(model.get_output_embeddings().weight.shape[0] <= largest_vocabulary())


def stepper_of(model: Any, cache: RheoCache) -> Stepper:
    """Return the stepper of a cache that holds a prompt; made on first use and kept, graphs included."""
    if cache.stepper is None:
        cache.stepper = Stepper.over(model, cache)
    assert isinstance(cache.stepper, Stepper)
    return cache.stepper


def _stop_ids(criteria: Any) -> list[int]:
    found = [c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)]
    return sorted({int(i) for ids in found for i in torch.as_tensor(ids).flatten().tolist()})


def why_not_sampled(processors: Any, *, ordered: bool) -> str | None:
    """Say why the sampler cannot do what transformers' logits processors do; None when it can.

    Args:
        processors: in the order in which they are applied.
        ordered: whether the order matters (it does not for the most likely token).
    """
    known = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    odd = [
        type(p).__name__ for p in processors if type(p) not in known
    ]  # by type: a subclass may do something else
    if odd:
        return f"it has no {', '.join(odd)}"
    order = [known.index(type(p)) for p in processors]
    if ordered and order != sorted(set(order)):
        return "it applies temperature, top-k and top-p once each, in this order"
    if any(type(p) is TopPLogitsWarper and p.top_p == 0 for p in processors):
        return "it has no top_p of 0 (temperature 0 is greedy)"
    return None


def sampling_of(processors: Any) -> dict[str, Any]:
    """Return temperature, top_k and top_p of `SamplingParams` as transformers' warpers have them."""
    params: dict[str, Any] = {"temperature": 1.0}
    for p in processors:
        if isinstance(p, TemperatureLogitsWarper):
            params["temperature"] = p.temperature
        elif isinstance(p, TopKLogitsWarper):
            params["top_k"] = p.top_k
        elif isinstance(p, TopPLogitsWarper):
            params["top_p"] = p.top_p
    return params
