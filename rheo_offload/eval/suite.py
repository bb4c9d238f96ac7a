"""An evaluation: tasks x methods x budgets, each case in one row, the stock model first.

Every method gets the same budget and a pool of 1.5 budgets, so that blocks really move.
"""

import dataclasses
import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rheo_offload.config import RheoConfig, packaged_names
from rheo_offload.config_checks import require
from rheo_offload.errors import RheoError
from rheo_offload.eval.json_records import JsonRecords
from rheo_offload.eval.kl import Divergence
from rheo_offload.eval.log import EvalLog, Row
from rheo_offload.eval.long_generation import LongGeneration
from rheo_offload.eval.needle import Needle
from rheo_offload.eval.perplexity import Perplexity
from rheo_offload.eval.prompts import Source
from rheo_offload.eval.ruler import Ruler
from rheo_offload.eval.task import Case, Finding, Job, Question, Settings, Task
from rheo_offload.model.offload import check_config, offload, restore
from rheo_offload.selection.policy import METHODS, check_files, make_selector

__all__ = ["DENSE", "TASKS", "Evaluation", "Setup", "check_lengths", "nearest", "setups_of", "tasks_of"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Needle(), Ruler(), JsonRecords(), LongGeneration(), Perplexity(), Divergence())
}
DENSE = "dense"
PACKAGED_AS = {"mean_key": "default", "full": "dense"}
"""Methods whose packaged configuration has another name than the method."""
EQUAL = (
    "selection.recent_blocks=auto",
    "cache.capacity_ratio=1.5",
    "cache.device_memory=floor",
    "audit.every=8",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A method at a budget; `config` is None for the stock model."""

    method: str
    token_budget: int | None = None
    config: RheoConfig | None = None


def nearest(kind: str, name: str, known: Iterable[str]) -> RheoError:
    """Return the error for an unknown name, with the nearest known one."""
    names = sorted(known)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {found[0]!r}?" if found else f"known: {', '.join(names)}"
    return RheoError(f"unknown {kind} {name!r}; {hint}")


def tasks_of(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names.

    Raises:
        RheoError: unknown, with the nearest name.
    """
    for name in names:
        if name not in TASKS:
            raise nearest("task", name, TASKS)
    return [TASKS[name] for name in dict.fromkeys(names)]


def setups_of(methods: Sequence[str], budgets: Sequence[int], overrides: Sequence[str] = ()) -> list[Setup]:
    """Return the stock model and every method at every budget.

    Args:
        methods: `METHOD` or `LABEL=METHOD`; METHOD is a selection method, a packaged configuration or a YAML file.
        budgets: tokens attended per KV head and step.
        overrides: `group.key=value` for all methods, `LABEL:group.key=value` for one.

    Raises:
        RheoError: an unknown method, a label twice, or an override for a label that is not there.
        ConfigError: a configuration that is refused, for example a budget below the forced blocks, or a method's file
            that is not there.
    """
    sources = {}
    for entry in methods:
        label, _, name = entry.rpartition("=")
        label = label or name
        if label in sources or (label == DENSE and name != DENSE):
            raise RheoError(f"the method {label!r} is named twice; tell them apart as LABEL={name}")
        sources[label] = _source_of(name)
    setups = [Setup(method=DENSE)]
    own: dict[str, list[str]] = {label: [] for label in sources}
    shared = []
    for override in overrides:
        label, colon, text = override.partition("=")[0].partition(":")
        if not colon:
            shared.append(override)
        elif label in own:
            own[label].append(override[len(label) + 1 :])
        else:
            raise nearest("method", label, own)
    for label, source in sources.items():
        if label == DENSE:
            continue
        for budget in budgets:
            equal = [f"selection.token_budget={budget}", *EQUAL]
            config = _configured(source, [*equal, *shared, *own[label]])
            setups.append(Setup(method=label, token_budget=budget, config=config))
            if config.selection.method == "full":
                break  # it attends to everything at any budget
    return setups


def _source_of(name: str) -> str:
    if name == DENSE:
        return DENSE
    if name in METHODS or name in packaged_names():
        return PACKAGED_AS.get(name, name)
    if Path(name).suffix in (".yaml", ".yml"):
        return name
    raise nearest("method", name, [*METHODS, *packaged_names(), DENSE])


def _configured(source: str, overrides: Sequence[str]) -> RheoConfig:
    config = RheoConfig.from_yaml(source).with_overrides(overrides)
    selection = config.selection
    check_files(make_selector(selection.method, selection.params, block_size=config.cache.block_size))
    plan = selection.reuse_layers
    if isinstance(plan, str):
        require(
            Path(plan).is_file(), "selection.reuse_layers", "pairs of layers, or a file that exists", plan
        )
    return config


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
        setups: the stock model first.
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
            RheoError: a prompt cannot be built, or a configuration does not fit the model; nothing has run then.
        """
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
    measured: dict[str, Any] = {}
    if finding.stats is not None:
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
        dense_question=finding.dense_question,
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
