"""Perplexity of a real text whose last tokens are decoded one by one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from rheo_offload.eval.forced import Forced, ForcedJob
from rheo_offload.eval.prompts import Source
from rheo_offload.eval.script import ScriptRun, decode_script, dense_script
from rheo_offload.eval.task import Case, Finding, Job, Progress, Settings

__all__ = ["Perplexity"]


class Perplexity(Forced):
    """Perplexity of a text whose last tokens are decoded one by one."""

    name = "perplexity"
    needs_reference = False

    def job(self, case: Case, source: Source, settings: Settings) -> Job:
        """Take the case's window of the text."""
        return _PerplexityJob(script=self.script(case, source), context=case.context)

    def summary(self, metrics: Sequence[Mapping[str, float]]) -> float:
        """Return the perplexity over all scored tokens."""
        return math.exp(sum(m["nll"] * m["tokens"] for m in metrics) / sum(m["tokens"] for m in metrics))


class _PerplexityJob(ForcedJob):
    def dense(self, model: PreTrainedModel, progress: Progress) -> Finding:
        return self._finding(dense_script(model, self.script, start=self.start, progress=progress))

    def sparse(self, model: PreTrainedModel, reference: Any, progress: Progress) -> Finding:
        return self._finding(decode_script(model, self.script, start=self.start, progress=progress))

    def _finding(self, run: ScriptRun) -> Finding:
        nll = -float(run.logprobs.double().mean())
        accuracy = float((run.likeliest == run.tokens).float().mean())
        metrics = {"nll": nll, "perplexity": math.exp(nll), "accuracy": accuracy}
        return Finding(metrics={**metrics, "tokens": float(len(run.tokens))}, stats=run.stats)
