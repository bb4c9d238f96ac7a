"""Measure one case: sessions of several subjects in turns, and each one's memory, counters and step split."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from bench.baselines import Decoder, Rheo, Unsupported, make
from bench.breakdown import step_parts
from bench.schema import Status
from bench.shapes import model_bytes
from bench.timing import PeakMeter, time_calls
from rheo_offload.config import RheoConfig
from rheo_offload.errors import DeviceMemoryError, HostMemoryError

ROUNDS = 2  # the subjects take turns; the spread between the rounds is the noise
SPLIT_STEPS = 8
OUT_OF_MEMORY = (torch.OutOfMemoryError, DeviceMemoryError, HostMemoryError)
TOTALS = (
    "selected_blocks",
    "miss_blocks",
    "evicted_blocks",
    "h2d_bytes",
    "streamed_h2d_bytes",
    "audit_h2d_bytes",
    "d2h_bytes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is measured: one batch size and context on one model."""

    model: PreTrainedModel
    config: RheoConfig
    batch: int
    context_len_tokens: int
    """Length of every row when the last step is done."""
    fill: str
    warmup: int
    steps: int
    miss_rates: Sequence[float]
    baselines: Sequence[str]

    @property
    def session_steps(self) -> int:
        """Decode steps of a session: warm-ups and steps for every forced miss rate, then the split."""
        return len(self.miss_rates) * (ROUNDS * self.warmup + self.steps) + SPLIT_STEPS


@dataclass(slots=True, kw_only=True)
class Session:
    """One subject while it is measured, and what was found."""

    name: str
    status: Status = "ok"
    error: str = ""
    note: str = ""
    rounds: dict[float, list[list[float]]] = field(default_factory=dict)
    """Forced miss rate -> the step times (ms) of every round."""
    totals: dict[float, dict[str, float]] = field(default_factory=dict)
    """Forced miss rate -> the counters of `TOTALS` over the timed steps."""
    split_ms: dict[str, float] = field(default_factory=dict)
    """Part of the step -> ms per step, without forced misses."""
    captured_mass: float | None = None
    device_kv_bytes: int = 0
    peak_bytes: int | None = None


def measure(task: Task) -> list[Session]:
    """Measure ours and the baselines of a task, in turns where their memory allows it.

    With `cache.device_memory: auto` ours takes what is free, so every subject then runs alone; so they do
    when they do not fit together. What does not fit even alone has status `oom`.
    """
    names = [*task.baselines, Rheo.name]
    if task.config.cache.device_memory != "auto":
        together = _measure_together(task, names)
        if all(s.status != "oom" for s in together):
            return together
    return [session for name in names for session in _measure_together(task, [name])]


def _measure_together(task: Task, names: Sequence[str]) -> list[Session]:
    runs = [_Run(task, name) for name in names]
    try:
        for stage in (_Run.start, *[_Run.time_round] * ROUNDS, _Run.finish):
            for run in runs:
                run.guarded(stage)
            if len(runs) > 1 and any(run.session.status == "oom" for run in runs):
                break
    finally:
        for run in runs:
            run.close()
    return [run.session for run in runs]


class _Run:
    """A subject with its session; every stage records what goes wrong instead of raising it."""

    def __init__(self, task: Task, name: str) -> None:
        self.task, self.session = task, Session(name=name)
        self.subject: Decoder | None = None
        self.device = task.model.device
        self.meter = PeakMeter(self.device, model_bytes(task.model))

    def guarded(self, stage: Callable[["_Run"], None]) -> None:
        """Run a stage unless an earlier one failed."""
        if self.session.status != "ok":
            return
        failure: tuple[Status, str] | None = None
        try:
            with torch.inference_mode(), self.meter.watch():
                stage(self)
        except OUT_OF_MEMORY as error:
            failure = "oom", _first_line(error)
        except Unsupported as error:
            failure = "unsupported", _first_line(error)
        # Only here is the exception gone, and with it the frames that hold tensors.
        if failure:
            self.session.status, self.session.error = failure
            self.close()

    def start(self) -> None:
        """Make the subject and fill its context."""
        task = self.task
        self.subject = subject = make(self.session.name, task.model, task.config)
        tokens = task.context_len_tokens - task.session_steps
        generator = torch.Generator().manual_seed(0)
        vocabulary = task.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (task.batch, tokens), generator=generator).to(self.device)
        subject.start(ids, fill=task.fill, max_length=task.context_len_tokens)

    def time_round(self) -> None:
        """Time this round's share of the steps for every forced miss rate."""
        subject, task = self._subject, self.task
        for rate in task.miss_rates if self.session.name == Rheo.name else (0.0,):
            before = subject.before_step(rate)
            for _ in range(task.warmup):
                if before is not None:
                    before()
                subject.step()
            start = subject.stats()
            done = self.session.rounds.setdefault(rate, [])
            steps = task.steps // ROUNDS + (task.steps % ROUNDS if not done else 0)
            done.append(time_calls(subject.step, steps, self.device, before))
            end = subject.stats()
            totals = self.session.totals.setdefault(rate, dict.fromkeys(TOTALS, 0.0) if start else {})
            for key in totals:
                totals[key] += end[key] - start[key]

    def finish(self) -> None:
        """Record memory and captured mass, then profile the parts of a step."""
        subject, session = self._subject, self.session
        session.device_kv_bytes, session.note = subject.device_kv_bytes(), subject.note
        if why := subject.why_eager():
            session.note = f"{subject.note} runs eagerly: {why}".strip()
        if isinstance(subject, Rheo):
            session.captured_mass = subject.stats().get("captured_mass_mean")
            session.split_ms = step_parts(subject, SPLIT_STEPS - 1)

    @property
    def _subject(self) -> Decoder:
        assert self.subject is not None
        return self.subject

    def close(self) -> None:
        """Give the memory back."""
        self.session.peak_bytes = self.meter.peak_bytes
        if self.subject is not None:
            self.subject.close()
            self.subject = None
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
