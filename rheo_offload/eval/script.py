"""Decoding by a script: given tokens are forced, the others are the likeliest; all of them one by one.

A script is a row of token ids, -1 where the model chooses. `decode_script` sends what stands after `start` through the
decode path of an offloaded model, captured steps included; `dense_script` is the same row in the stock model, whose
given tokens go in chunk by chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rheo_offload.errors import NonFiniteError
from rheo_offload.metrics.stats import Stats
from rheo_offload.model.stepper import Stepper

__all__ = ["FREE", "ScriptRun", "ScriptedSampler", "decode_script", "dense_script", "script_of"]

FREE = -1
CHUNK_TOKENS = 1024
SCORED_CHUNK_TOKENS = 64
"""Tokens of a forward whose logits are all kept: a vocabulary of 262,144 makes 64 MiB of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRun:
    """What came of the positions `start + 1 ..` of a script; everything on the CPU.

    Attributes:
        tokens: [T] int64, the token taken at each position: the script's, or the likeliest.
        likeliest: [T] int64.
        logprobs: [T] fp32, natural log-probability of `tokens`.
        divergences: [T] fp32, KL(reference || this model) in nats; None without a reference.
        distributions: [T, V] fp32 log-probabilities; None unless asked for.
        stats: figures of the decode steps; None for the stock model.
    """

    tokens: Tensor
    likeliest: Tensor
    logprobs: Tensor
    divergences: Tensor | None = None
    distributions: Tensor | None = None
    stats: Stats | None = None


def script_of(ids: Tensor, new_tokens: int = 0) -> Tensor:
    """Return `ids` [1, n] as a script [n + new_tokens] whose last `new_tokens` are free."""
    return torch.cat([ids[0].cpu(), torch.full((new_tokens,), FREE, dtype=torch.int64)])


class ScriptedSampler:
    """Takes the place of a step's sampler, for one row: the script's token, or the likeliest one.

    It notes what it saw by position, on the device, so that a captured step needs no host.
    """

    def __init__(self, script: Tensor, device: torch.device, reference: Tensor | None = None) -> None:
        """Take a script [L] and, for its last positions, reference log-probabilities [T, V] fp32."""
        length = len(script)
        self.script = script.to(device)
        self.likeliest = torch.full((length,), FREE, dtype=torch.int64, device=device)
        self.tokens = torch.full((length,), FREE, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(length, dtype=torch.float32, device=device)
        self.divergences = torch.zeros(length, dtype=torch.float32, device=device)
        self.reference = None if reference is None else reference.to(device)
        self._first = length if reference is None else length - len(reference)
        self.bad = torch.zeros(1, dtype=torch.bool, device=device)

    def all_greedy(self, rows: int) -> bool:
        """Every step is of one kind."""
        return True

    def __call__(self, logits: Tensor, positions: Tensor, *, greedy: bool) -> Tensor:
        """Return the token [1] for the position [1] that logits [1, V] predict."""
        logprobs = logits.float().log_softmax(-1)
        likeliest = logprobs.argmax(-1)
        given = self.script[positions]
        tokens = torch.where(given >= 0, given, likeliest)
        taken = logprobs.gather(1, tokens[:, None])[:, 0]
        self.bad |= torch.isnan(taken)
        self.likeliest.index_copy_(0, positions, likeliest)
        self.tokens.index_copy_(0, positions, tokens)
        self.logprobs.index_copy_(0, positions, taken)
        if self.reference is not None:
            expected = self.reference[(positions - self._first).clamp(min=0)]
            self.divergences.index_copy_(0, positions, _divergence(expected, logprobs))
        return tokens


def _divergence(expected: Tensor, logprobs: Tensor) -> Tensor:
    """KL(expected || logprobs) over the last dimension, in nats, of log-probabilities."""
    return (expected.exp() * (expected - logprobs)).sum(-1)


@torch.no_grad()
def decode_script(
    model: PreTrainedModel,
    script: Tensor,
    *,
    start: int,
    reference: Tensor | None = None,
    stop: Callable[[int], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScriptRun:
    """Read `script[:start]` as a prompt, and everything after it token by token through the decode path.

    Args:
        model: offloaded.
        script: [L] int64, FREE from some place after `start` on.
        start: tokens that the exact, dense prefill reads; at least 1, at most L - 2.
        reference: [T, V] fp32 log-probabilities of the last T positions.
        stop: told of every token from position `start + 1` on; the run ends with the one for which it returns True.
        progress: called with (decode steps done, in all).

    Raises:
        NonFiniteError: a step gave NaN.
        ValueError: start leaves nothing to predict, or a token that must be read is FREE.
    """
    steps = len(script) - start - 1
    if start < 1 or steps < 1 or int(script[: start + 1].min()) < 0:
        raise ValueError(f"a script of {len(script)} tokens cannot start at {start}")
    handle: Any = model.rheo
    device = model.device
    cache = handle.new_cache(max_length=len(script))
    try:
        cache.clock.start(start + 1, 1)
        handle.prefill(cache, script[None, :start].to(device))
        sampler: Any = ScriptedSampler(script, device, reference)  # in a sampler's place
        graph = handle.config.execution.graph != "off"
        stepper = cache.stepper = Stepper(model, cache, sampler, graph=graph)
        stepper.ids.copy_(script[None, start : start + 1])
        made = 0
        with model._optimize_model_for_decode():
            for step in range(steps + 1):
                if step < steps:
                    stepper.launch()
                if step:  # one step late, so that the next one is queued already
                    got = stepper.read(step - 1)
                    cache.clock.tick()
                    made = step
                    if progress is not None:
                        progress(made, steps)
                    if stop is not None and stop(int(got.tokens[0])):
                        break
        if bool(sampler.bad):
            raise NonFiniteError(f"the model's logits were not finite within {made} decode steps")
        after = slice(start + 1, start + 1 + made)
        return ScriptRun(
            tokens=sampler.tokens[after].cpu(),
            likeliest=sampler.likeliest[after].cpu(),
            logprobs=sampler.logprobs[after].cpu(),
            divergences=None if reference is None else sampler.divergences[-len(reference) :].cpu(),
            stats=handle.stats(cache),
        )
    finally:
        cache.close()


@torch.no_grad()
def dense_script(
    model: PreTrainedModel,
    script: Tensor,
    *,
    start: int,
    keep_distributions: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ScriptRun:
    """Run a script in the stock model with its own cache, as the truth to compare with.

    Args:
        model: not offloaded.
        script: [L] int64, FREE from some place after `start` on.
        start: the first position whose successor is looked at.
        keep_distributions: keep every log-probability.
        progress: called with (positions done, in all).
    """
    free = torch.nonzero(script == FREE)
    given = int(free[0]) if len(free) else len(script)
    cache = DynamicCache(config=model.config)
    pieces = [*range(0, start, CHUNK_TOKENS), *range(start, given, SCORED_CHUNK_TOKENS), given]
    parts: list[tuple[Tensor, ...]] = []
    next_token = torch.empty(1, dtype=torch.int64)
    for at, end in zip(pieces, pieces[1:], strict=False):
        keep = 1 if at < start else end - at
        logits = _forward(model, cache, script[at:end], keep)
        if at < start:
            continue
        wanted = torch.cat(
            [script[at + 1 : end + 1], script.new_full((max(0, end + 1 - len(script)),), FREE)]
        )
        parts.append(_look(logits, wanted, keep_distributions))
        next_token = parts[-1][0][-1:]
        if progress is not None:
            progress(end - start, len(script) - 1 - start)
    for at in range(given, len(script) - 1):
        parts.append(
            _look(_forward(model, cache, next_token, 1), script[at + 1 : at + 2], keep_distributions)
        )
        next_token = parts[-1][0]
        if progress is not None:
            progress(at + 1 - start, len(script) - 1 - start)
    tokens, likeliest, logprobs, *rest = (
        torch.cat(part)[: len(script) - 1 - start] for part in zip(*parts, strict=True)
    )
    return ScriptRun(
        tokens=tokens,
        likeliest=likeliest,
        logprobs=logprobs,
        distributions=rest[0] if rest else None,
    )


def _forward(model: PreTrainedModel, cache: Any, ids: Tensor, keep: int) -> Tensor:
    """Return logits [keep, V] of the last tokens."""
    out = model(
        input_ids=ids[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=keep
    )
    return out.logits[0]


def _look(logits: Tensor, wanted: Tensor, keep_distributions: bool) -> tuple[Tensor, ...]:
    """Return taken tokens, likeliest ones, log-probabilities (and all of them), on the CPU."""
    logprobs = logits.float().log_softmax(-1)
    likeliest = logprobs.argmax(-1)
    wanted = wanted.to(likeliest.device)
    tokens = torch.where(wanted >= 0, wanted, likeliest)
    found = [tokens, likeliest, logprobs.gather(1, tokens[:, None])[:, 0]]
    return tuple(t.cpu() for t in (found + [logprobs] if keep_distributions else found))
