"""KL divergence of the next-token distribution from the stock model's, on the same teacher-forced tokens."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from rheo_offload.eval.forced import Forced, ForcedJob
from rheo_offload.eval.prompts import Source
from rheo_offload.eval.script import ScriptRun, decode_script, dense_script
from rheo_offload.eval.task import Case, Finding, Job, Progress, Settings

__all__ = ["Divergence"]


class Divergence(Forced):
    """KL divergence of the next-token distribution from the stock model's."""

    name = "kl"
    needs_reference = True

    def job(self, case: Case, source: Source, settings: Settings) -> Job:
        """Take the case's window of the text."""
        return _DivergenceJob(script=self.script(case, source), context=case.context)

    def summary(self, metrics: Sequence[Mapping[str, float]]) -> float:
        """Return the mean divergence in nats."""
        return sum(m["kl"] * m["tokens"] for m in metrics) / sum(m["tokens"] for m in metrics)


class _DivergenceJob(ForcedJob):
    def dense(self, model: PreTrainedModel, progress: Progress) -> Finding:
        run = dense_script(model, self.script, start=self.start, keep_distributions=True, progress=progress)
        return Finding(
            metrics={
                "kl": 0.0,
                "kl_p95": 0.0,
                "kl_max": 0.0,
                "agreement": 1.0,
                "tokens": float(len(run.tokens)),
            },
            reference=run,
        )

    def sparse(self, model: PreTrainedModel, reference: ScriptRun, progress: Progress) -> Finding:
        run = decode_script(
            model, self.script, start=self.start, reference=reference.distributions, progress=progress
        )
        assert run.divergences is not None
        kl = run.divergences.double()
        return Finding(
            metrics={
                "kl": float(kl.mean()),
                "kl_p95": float(kl.quantile(0.95)),
                "kl_max": float(kl.max()),
                "agreement": float((run.likeliest == reference.likeliest).float().mean()),
                "tokens": float(len(kl)),
            },
            stats=run.stats,
        )
