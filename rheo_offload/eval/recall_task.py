"""Synthetic recall as a task: records in filler, and questions asked turn by turn on one cache (`recall.py`).

For models whose vocabulary is the task's own, as `native`. The question is never prefilled for comparison: what must be
looked up is the name at its end, and the last token of a prompt goes through the decode path in any case.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rheo_offload.errors import RheoError
from rheo_offload.eval.prompts import Source, rng_of
from rheo_offload.eval.recall import SLOT, TASKS, VOCABULARY, Layout, ask, draw_sequence
from rheo_offload.eval.task import Case, Finding, Job, Progress, Settings

__all__ = ["Recall", "speaks_recall"]

QUESTION_TOKENS = 320
"""Room for questions and answers at most, a third of a short sequence; as in training."""


def speaks_recall(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of a tokenizer are the words of the recall task."""
    size = len(VOCABULARY)
    return len(tokenizer) == size and tokenizer.convert_ids_to_tokens(list(range(size))) == VOCABULARY


class Recall:
    """Questions about records in a long filler: values of names, chains of names, spans to copy."""

    name = "recall"
    needs_reference = False
    prefills_question = False

    def cases(self, settings: Settings) -> list[Case]:
        """Return one sequence per context and sample; its length includes questions and answers."""
        return [
            Case(task=self.name, params={"context": n, "sample": sample}, new_tokens=0)
            for n in settings.contexts
            for sample in range(settings.samples)
        ]

    def job(self, case: Case, source: Source, settings: Settings) -> Job:
        """Draw a sequence, from a seed of 63 bits that a training does not meet."""
        seed = rng_of(settings.seed, self.name, case.name).getrandbits(63)
        room = min(QUESTION_TOKENS, case.context // 3)
        try:
            layout, ids = draw_sequence(case.context, room, seed)
        except ValueError as error:
            raise RheoError(f"recall: {error}; raise --contexts") from error
        return _RecallJob(ids=ids, layout=layout)

    def summary(self, metrics: Sequence[Mapping[str, float]]) -> float:
        """Return the share of all questions that were answered exactly."""
        return sum(m["score"] * m["questions"] for m in metrics) / sum(m["questions"] for m in metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecallJob:
    """A sequence [1, L] with its questions and their answers."""

    ids: Tensor
    layout: Layout

    @property
    def tokens(self) -> int:
        return self.layout.num_tokens

    def dense(self, model: PreTrainedModel, progress: Progress) -> Finding:
        return Finding(metrics=self._metrics(model, DynamicCache(config=model.config), progress))

    def sparse(self, model: PreTrainedModel, reference: Any, progress: Progress) -> Finding:
        handle: Any = model.rheo
        cache = handle.new_cache(max_length=self.tokens + SLOT)
        try:
            return Finding(metrics=self._metrics(model, cache, progress), stats=handle.stats(cache))
        finally:
            cache.close()

    def _metrics(self, model: PreTrainedModel, cache: Any, progress: Progress) -> dict[str, float]:
        """Ask everything; a kind of question that the sequence does not ask has no share."""
        right: dict[str, list[bool]] = {kind: [] for kind in TASKS}
        begin = self.layout.context_tokens
        for question, answer in ask(model, self.ids, self.layout, cache=cache):
            wanted = self.ids[0, question.start + 1 : question.end + 1].tolist()
            right[question.task].append(answer == wanted)
            progress(question.end + 1 - begin, self.tokens - begin)
        every = [hit for hits in right.values() for hit in hits]
        found = {"score": sum(every) / len(every), "questions": float(len(every))}
        for kind, hits in right.items():
            if hits:
                found |= {kind: sum(hits) / len(hits), f"{kind}_questions": float(len(hits))}
        return found
