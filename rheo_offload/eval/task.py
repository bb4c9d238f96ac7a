"""What a task of the evaluation is: its cases, what is asked in each, and how an answer is judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel

from rheo_offload.eval.prompts import Prompt, Source
from rheo_offload.eval.script import ScriptRun, decode_script, dense_script, script_of
from rheo_offload.metrics.stats import Stats

__all__ = ["Case", "Finding", "Job", "Question", "Settings", "Task"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How large an evaluation is."""

    contexts: tuple[int, ...] = (4096,)
    """Prompt lengths in tokens."""
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Where a fact stands, 0 = at the beginning, 1 = before the question."""
    keys: tuple[int, ...] = (1, 4)
    """Vaults whose codes a needle prompt names, at most `needle.NAMES`."""
    samples: int = 1
    """Cases of each kind, each with other names and numbers."""
    scored_tokens: int = 256
    """Tokens that `perplexity` and `kl` force through the decode path."""
    long_tokens: int = 8192
    """Tokens that `long_generation` makes."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt of a task; its name is its parameters, so that it says which row is which."""

    task: str
    params: Mapping[str, int | float | str]
    new_tokens: int
    """Positions that the answer may take at most."""

    @property
    def context(self) -> int:
        """Tokens of the prompt."""
        return int(self.params["context"])

    @property
    def name(self) -> str:
        """The parameters as text."""
        return " ".join(f"{key}={value}" for key, value in self.params.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one model made of one case."""

    metrics: dict[str, float]
    dense_question: dict[str, float] | None = None
    """The same when the question, too, is read by the dense prefill."""
    answer: str | None = None
    stats: Stats | None = None
    """Figures of the run behind `metrics`; None for the stock model."""
    reference: Any = field(default=None, repr=False)
    """What the stock model leaves for the others to be compared with."""


class Job(Protocol):
    """A case made concrete for one tokenizer."""

    @property
    def tokens(self) -> int:
        """Tokens of the longest sequence."""

    def dense(self, model: PreTrainedModel, progress: Progress) -> Finding:
        """Ask the stock model."""

    def sparse(self, model: PreTrainedModel, reference: Any, progress: Progress) -> Finding:
        """Ask an offloaded model; `reference` is the stock model's, None where it leaves none."""


class Task(Protocol):
    """One task; registered in `suite.TASKS`."""

    name: str
    needs_reference: bool
    """Whether an offloaded model's finding compares with the stock model's."""
    prefills_question: bool
    """Whether there is a question whose dense prefill can be tried beside."""

    def cases(self, settings: Settings) -> list[Case]:
        """Return the cases, without a tokenizer."""

    def job(self, case: Case, source: Source, settings: Settings) -> Job:
        """Make a case concrete."""

    def summary(self, metrics: Sequence[Mapping[str, float]]) -> float:
        """Return the one number that stands for several cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A job that asks once: the question goes through the decode path, so does the answer.

    Attributes:
        prompt: what is asked.
        new_tokens: tokens that the answer may take.
        grade: text of the answer -> metrics, `score` (0..1) among them.
        source: whose tokenizer it is.
        dense_question: ask a second time with the question in the dense prefill.
    """

    prompt: Prompt
    new_tokens: int
    grade: Callable[[str], dict[str, float]]
    source: Source
    dense_question: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt.ids.shape[1] + self.new_tokens

    def dense(self, model: PreTrainedModel, progress: Progress) -> Finding:
        """Ask the stock model."""
        start = self.prompt.ids.shape[1] - 1
        run = dense_script(model, self._script(), start=start, progress=progress)
        return self._finding(run)

    def sparse(self, model: PreTrainedModel, reference: Any, progress: Progress) -> Finding:
        """Ask an offloaded model, with the question through the decode path and with it in the prefill."""
        length = self.prompt.ids.shape[1]
        other = None
        if self.dense_question:
            run = decode_script(model, self._script(), start=length - 1, progress=progress)
            other = self._finding(run).metrics
        start = length - self.prompt.question_tokens
        return self._finding(
            decode_script(model, self._script(), start=start, progress=progress), dense_question=other
        )

    def _script(self) -> Any:
        return script_of(self.prompt.ids, self.new_tokens)

    def _finding(self, run: ScriptRun, *, dense_question: dict[str, float] | None = None) -> Finding:
        answer = self.source.tokenizer.decode(run.tokens[-self.new_tokens :])
        return Finding(
            metrics=self.grade(answer), dense_question=dense_question, answer=answer, stats=run.stats
        )


def mean_score(metrics: Sequence[Mapping[str, float]]) -> float:
    """Return the mean of `score`."""
    return sum(m["score"] for m in metrics) / len(metrics)
