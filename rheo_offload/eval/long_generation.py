"""Long answers: thousands of greedy tokens, where small errors add up.

Two runs per method: one on its own (where it first differs from the stock model, how much it repeats itself), and one
forced along the stock model's tokens: how often it would have said the same, whatever it had said before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rheo_offload.eval.prompts import Source
from rheo_offload.eval.script import ScriptRun, decode_script, dense_script, script_of
from rheo_offload.eval.task import Case, Finding, Job, Progress, Settings, mean_score

__all__ = ["LongGeneration", "repetition"]

NGRAM = 4


class LongGeneration:
    """Agreement with the stock model over a long answer."""

    name = "long_generation"
    needs_reference = True
    prefills_question = False

    def cases(self, settings: Settings) -> list[Case]:
        """Return one case per context and sample."""
        return [
            Case(
                task=self.name,
                params={"context": n, "new": settings.long_tokens, "sample": sample},
                new_tokens=settings.long_tokens,
            )
            for n in settings.contexts
            for sample in range(settings.samples)
        ]

    def job(self, case: Case, source: Source, settings: Settings) -> Job:
        """Take a piece of the text as the prompt; sample n begins n times 1024 tokens further on."""
        skip = 1024 * int(case.params["sample"])
        text = source.prose(case.context - len(source.bos), skip=skip)
        return _LongJob(ids=torch.tensor([[*source.bos, *text]]), new_tokens=int(case.params["new"]))

    def summary(self, metrics: Sequence[Mapping[str, float]]) -> float:
        """Return the mean agreement."""
        return mean_score(metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LongJob:
    """A prompt [1, n] and how many tokens follow."""

    ids: Tensor
    new_tokens: int

    @property
    def tokens(self) -> int:
        return self.ids.shape[1] + self.new_tokens

    def dense(self, model: PreTrainedModel, progress: Progress) -> Finding:
        script = script_of(self.ids, self.new_tokens)
        run = dense_script(model, script, start=self.ids.shape[1] - 1, progress=progress)
        return Finding(metrics=self._metrics(run, run, agreement=1.0), reference=run)

    def sparse(self, model: PreTrainedModel, reference: ScriptRun, progress: Progress) -> Finding:
        start = self.ids.shape[1] - 1
        forced = decode_script(
            model, torch.cat([self.ids[0], reference.tokens]), start=start, progress=progress
        )
        agreement = float((forced.likeliest == reference.tokens).float().mean())
        alone = decode_script(model, script_of(self.ids, self.new_tokens), start=start, progress=progress)
        return Finding(metrics=self._metrics(alone, reference, agreement=agreement), stats=alone.stats)

    def _metrics(self, run: ScriptRun, reference: ScriptRun, *, agreement: float) -> dict[str, float]:
        differs = torch.nonzero(run.tokens != reference.tokens)
        first = int(differs[0]) if len(differs) else len(run.tokens)
        return {
            "score": agreement,
            "first_difference": float(first),
            "repetition": repetition(run.tokens.tolist()),
            "tokens": float(len(run.tokens)),
        }


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of n-grams that occurred before, 0 (none) to nearly 1; 0 for fewer than n tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
