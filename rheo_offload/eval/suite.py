"""An evaluation: tasks x methods x budgets, each case in one row, the dense model first.

Every method gets the same budget and a pool of 1.5 budgets, so that blocks really move (`setups.py`).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rheo_offload.errors import RheoError
from rheo_offload.eval.json_records import JsonRecords
from rheo_offload.eval.kl import Divergence
from rheo_offload.eval.log import EvalLog, Row
from rheo_offload.eval.long_generation import LongGeneration
from rheo_offload.eval.needle import Needle
from rheo_offload.eval.perplexity import Perplexity
from rheo_offload.eval.prompts import Source
from rheo_offload.eval.recall_task import Recall, speaks_recall
from rheo_offload.eval.ruler import Ruler
from rheo_offload.eval.setups import DENSE, Setup, nearest
from rheo_offload.eval.task import Case, Finding, Job, Question, Settings, Task
from rheo_offload.model.offload import check_config, offload, restore

__all__ = ["TASKS", "Evaluation", "check_lengths", "check_tasks", "tasks_of"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Needle(), Ruler(), JsonRecords(), LongGeneration(), Perplexity(), Divergence(), Recall())
}


def tasks_of(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names.

    Raises:
        RheoError: unknown, with the nearest name.
    """
    for name in names:
        if name not in TASKS:
            raise nearest("task", name, TASKS)
    return [TASKS[name] for name in dict.fromkeys(names)]


def check_tasks(tasks: Sequence[Task], setups: Sequence[Setup], *, recall: bool) -> None:
    """Refuse tasks that mean nothing to a model.

    Args:
        tasks: what is to be asked.
        setups: of `setups_of`, the dense model first.
        recall: whether the model's vocabulary is that of the task `recall`.

    Raises:
        RheoError: names the task, the reason and the remedy.
    """
    for task in tasks:
        if recall and task.name != Recall.name:
            raise RheoError(
                f"the task {task.name} is made of text, and this model's vocabulary has no other words than those of "
                "synthetic recall; use --tasks recall"
            )
        if not recall and task.name == Recall.name:
            raise RheoError(
                "the task recall is made of its own words, and this model's tokenizer is another one; name other "
                "--tasks, or a model of that vocabulary, as --model native"
            )
        if task.needs_reference and setups[0].config is not None:
            raise RheoError(
                f"the task {task.name} compares with the stock model, which lacks the learned bias of this model's "
                "own rheo.yaml; leave it out of --tasks"
            )


def check_lengths(tasks: Sequence[Task], settings: Settings, positions: int | None) -> None:
    """Refuse cases that run past the model's positions.

    Raises:
        RheoError: names the task, the case and the numbers.
    """
    for task in tasks:
        for case in task.cases(settings):
            total = case.context + case.new_tokens
            if positions is not None and total > positions:
                raise RheoError(
                    f"{task.name} ({case.name}) takes up to {total} positions, {total - positions} more than the "
                    f"model's {positions}; shorten --contexts, --scored-tokens or --long-tokens"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is to be done.

    Attributes:
        tasks: in this order.
        setups: the dense model first.
        settings: sizes and seed.
        dense_question: ask every question a second time, read by the dense prefill.
    """

    tasks: Sequence[Task]
    setups: Sequence[Setup]
    settings: Settings
    dense_question: bool = True

    def missing(self, log: EvalLog) -> list[tuple[Task, Case, Setup]]:
        """Return what the log has no row for, in the order in which it is done."""
        return [
            (task, case, setup)
            for task in self.tasks
            for setup in self.setups
            for case in task.cases(self.settings)
            if (task.name, setup.method, setup.token_budget, case.name) not in log.rows
        ]

    def planned(self, log: EvalLog) -> list[Row]:
        """Return the log's rows that belong to this evaluation, in order."""
        keys = [
            (task.name, setup.method, setup.token_budget, case.name)
            for task in self.tasks
            for setup in self.setups
            for case in task.cases(self.settings)
        ]
        return [log.rows[key] for key in keys if key in log.rows]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        paragraphs: Sequence[str],
        log: EvalLog,
        *,
        on_row: Callable[[Row], None] = lambda row: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Do what is missing; rows are in the log as soon as they are done.

        Args:
            model: not offloaded; it is offloaded for each method in turn and restored.
            tokenizer: of the model.
            paragraphs: the text that prompts are filled with.
            log: where rows go.
            on_row: told of every new row.
            progress: called with (tokens done, in all) within a case.

        Raises:
            RheoError: a task or a configuration does not fit the model, or a prompt cannot be built; nothing has run
                then.
        """
        check_tasks(self.tasks, self.setups, recall=speaks_recall(tokenizer))
        dense = self.setups[0].config
        if dense is not None:  # made for a number of positions that may have been a guess
            check_lengths(self.tasks, self.settings, int(dense.selection.token_budget))
        missing = self.missing(log)
        for config in {id(s): s.config for _, _, s in missing if s.config is not None}.values():
            check_config(model, config)
        source = Source(tokenizer, paragraphs)
        jobs = {(case.task, case.name): self._job(task, case, source) for task, case, _ in missing}
        checked = False
        for task in self.tasks:
            todo = [(case, setup) for t, case, setup in missing if t is task]
            references = self._dense(task, todo, jobs, model, log, on_row, progress)
            for setup in self.setups:
                cases = [case for case, wanted in todo if wanted is setup and setup.config is not None]
                if not cases:
                    continue
                assert setup.config is not None
                offload(model, setup.config, check=not checked)
                checked = True
                try:
                    for case in cases:
                        job, reference = jobs[case.task, case.name], references.get(case.name)
                        began = time.perf_counter()
                        finding = job.sparse(model, reference, progress)
                        row = _row(case, setup, finding, time.perf_counter() - began)
                        log.append(row)
                        on_row(row)
                finally:
                    restore(model)

    def _job(self, task: Task, case: Case, source: Source) -> Job:
        job = task.job(case, source, self.settings)
        if isinstance(job, Question):
            return dataclasses.replace(job, dense_question=self.dense_question)
        return job

    def _dense(
        self,
        task: Task,
        todo: Sequence[tuple[Case, Setup]],
        jobs: dict[tuple[str, str], Job],
        model: PreTrainedModel,
        log: EvalLog,
        on_row: Callable[[Row], None],
        progress: Callable[[int, int], None],
    ) -> dict[str, Any]:
        """Ask the stock model what is missing of it, and what the others are compared with."""
        references = {}
        for case in task.cases(self.settings):
            wanted = [setup for c, setup in todo if c.name == case.name]
            unlogged = any(setup.config is None for setup in wanted)
            if unlogged or (wanted and task.needs_reference):
                began = time.perf_counter()
                finding = jobs[case.task, case.name].dense(model, progress)
                references[case.name] = finding.reference
                if unlogged:
                    row = _row(case, Setup(method=DENSE), finding, time.perf_counter() - began)
                    log.append(row)
                    on_row(row)
        return references


STATS_FIELDS = tuple(
    f.name
    for f in dataclasses.fields(Row)
    if f.default is None and f.name not in ("dense_question", "answer", "valid", "invalid_because")
)


def _row(case: Case, setup: Setup, finding: Finding, seconds: float) -> Row:
    """A dense row says nothing about offloading, also where it took an offloaded model (`setups._dense`)."""
    measured: dict[str, Any] = {}
    if finding.stats is not None and setup.method != DENSE:
        measured = {name: getattr(finding.stats, name) for name in STATS_FIELDS}
        why = why_invalid(measured["evicted_blocks"], measured["miss_blocks"])
        measured |= {"valid": why is None, "invalid_because": why}
    return Row(
        task=case.task,
        case=case.name,
        method=setup.method,
        token_budget=setup.token_budget,
        context_len_tokens=case.context,
        metrics=finding.metrics,
        dense_question=None if setup.method == DENSE else finding.dense_question,
        answer=finding.answer,
        seconds=round(seconds, 3),
        **measured,
    )


def why_invalid(evicted_blocks: int, miss_blocks: int) -> str | None:
    """Say why a row proves nothing about offloading; None when blocks were evicted and loaded again."""
    missing = [
        what for what, count in (("evicted", evicted_blocks), ("loaded again", miss_blocks)) if count == 0
    ]
    return f"no block was {' or '.join(missing)}" if missing else None
