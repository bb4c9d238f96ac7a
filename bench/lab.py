"""What the suites of `bench targets` share: one model, one offloaded view of it, filled host pages, clocks and rows."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.decoder import Decoder
from bench.graphed import Graphed
from bench.ours import OURS, Rheo, Selection
from bench.recorded import Recording
from bench.reservoir import Reservoir
from bench.schema import Row
from bench.selectors import Recorded
from bench.sessions import ROUNDS, TOTALS
from bench.shapes import StepCost, model_bytes, step_cost
from bench.timing import Quantiles, Rates, time_calls
from rheo_offload.cache.layout import PageLayout
from rheo_offload.config import RheoConfig, resolve_auto
from rheo_offload.model.specs import layer_specs

SESSION_BLOCKS = 6  # a row may grow by this much while it is measured
FIRST_WARMUP = 6  # two eager steps, the capture, and then some
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the cases of the suites are."""

    short: int
    """The usual context, in tokens."""
    long: int
    long_batch: int
    choosing_batch: int
    resident_batches: tuple[int, ...]
    miss_batches: tuple[int, ...]
    peer_batches: tuple[int, ...]
    miss_rates: tuple[float, ...]
    memory_contexts: tuple[int, ...]
    memory_caps: tuple[int, ...]
    """Device memory in bytes; 0 = weights and room for a few rows (for the CPU)."""
    reservoir_bytes: int
    """Host memory that the suites other than `memory` fill."""
    steps: int
    warmup: int
    settle: int
    """Steps that a recording plays before it is timed."""


FULL = Scale(
    short=16384,
    long=131072,
    long_batch=4,
    choosing_batch=8,
    resident_batches=(1, 8, 16, 32, 64),
    miss_batches=(1, 16, 64),
    peer_batches=(16, 32, 64),
    miss_rates=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2),
    memory_contexts=(16384, 32768, 65536),
    memory_caps=(24 * GIB, 40 * GIB, 80 * GIB),
    reservoir_bytes=64 * GIB,
    steps=32,
    warmup=4,
    settle=24,
)
QUICK = Scale(
    short=256,
    long=512,
    long_batch=1,
    choosing_batch=2,
    resident_batches=(1, 2),
    miss_batches=(2,),
    peer_batches=(2,),
    miss_rates=(0.0, 0.2),
    memory_contexts=(256, 512),
    memory_caps=(0,),
    reservoir_bytes=8 << 20,
    steps=4,
    warmup=1,
    settle=2,
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Step times of one subject and what its counters say per step."""

    times: Quantiles
    noise: float
    per_step: dict[str, float]

    @property
    def ms(self) -> float:
        """The median."""
        return self.times.p50


@dataclass(kw_only=True)
class Lab:
    """See the module. Everything runs in inference mode."""

    model: PreTrainedModel
    model_name: str
    config: RheoConfig
    rates: Rates
    scale: Scale
    traces: Path
    """Folder with the recordings `[<model>-]s64-heat.npz` and `[<model>-]s64-noheat.npz`."""
    emit: Callable[[Row], None]
    suite: str = ""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def layers(self) -> int:
        """Number of attention layers."""
        return len(layer_specs(self.model.config))

    def resolved(self, context: int) -> RheoConfig:
        """Return the configuration of a context."""
        return resolve_auto(self.config, context_len_tokens=context, device_type=self.device.type)

    def say(self, text: str) -> None:
        """Print progress."""
        print(f"  {text}", flush=True)

    # ---- subjects --------------------------------------------------------------------------------------------------

    @cached_property
    def owner(self) -> Rheo:
        """The offloaded view that all our subjects use, with its host store."""
        return Rheo(self.model, self.config)

    @cached_property
    def reservoir(self) -> Reservoir:
        """The filled pages."""
        rows = max((*self.scale.resident_batches, *self.scale.peer_batches))
        return Reservoir(self.owner, open_pages=2 * rows * SESSION_BLOCKS)

    @cached_property
    def page_bytes(self) -> int:
        """Host memory of one block of a row, all layers."""
        specs = layer_specs(self.model.config)
        return PageLayout.of(specs, self.config.cache.block_size, self.model.dtype).page_bytes

    @contextmanager
    def ours(
        self,
        name: str,
        batch: int,
        context: int,
        selection: Selection | None = None,
        *,
        overrides: tuple[str, ...] = (),
        warm: bool = True,
        reservoir_bytes: int | None = None,
    ) -> Iterator[Rheo]:
        """Give one of our subjects, its rows `context` tokens long, ready to step.

        Args:
            name: of `OURS`.
            batch: rows.
            context: tokens before the first step; whole blocks.
            selection: instead of the configured method.
            overrides: configuration on top of the run's; what is fixed when a model is offloaded (the method, its
                index) stays as it is.
            warm: load the pools before the first step (sink, recent and hottest blocks).
            reservoir_bytes: host memory to fill at most; None: the scale's.
        """
        size = self.config.cache.block_size
        limit = self.scale.reservoir_bytes if reservoir_bytes is None else reservoir_bytes
        blocks = batch * context // size
        clock = time.perf_counter()
        before = len(self.reservoir.pages)
        self.reservoir.ensure(max(context // size, min(blocks, limit // self.page_bytes)))
        if filled := len(self.reservoir.pages) - before:
            gib = filled * self.page_bytes / GIB
            self.say(f"filled {gib:.1f} GiB of host pages in {time.perf_counter() - clock:.1f} s")
        config = self.resolved(context).with_overrides(overrides)
        clock = time.perf_counter()
        subject = OURS[name](self.model, config, shared=self.owner.model)
        subject.selection = selection
        try:
            longest = context + SESSION_BLOCKS * size
            subject.cache = subject.new_cache(batch, longest)
            executor = subject.cache.open(batch, context, self.model.dtype, self.device)
            distinct = self.reservoir.lend(executor.cache, context, longest)
            subject.cache.hf_length = context
            if distinct < batch:
                subject.note = f"{batch} rows share the host pages of {distinct}"
            subject.distinct_rows = distinct
            subject.prepare(self._first_tokens(batch))
            if warm:
                executor.warm()
            self.say(f"{name}, B={batch}, {context} tokens: ready after {time.perf_counter() - clock:.1f} s")
            yield subject
        finally:
            subject.close()
            self.free()

    @contextmanager
    def baseline(self, kind: type[Graphed], batch: int, context: int) -> Iterator[Graphed]:
        """Give a graphed baseline over a random cache of `context` tokens."""
        subject = kind(self.model)
        try:
            longest = context + SESSION_BLOCKS * self.config.cache.block_size
            ids = self._first_tokens(batch).expand(batch, context + 1)
            subject.start(ids, fill="random", max_length=longest)
            yield subject
        finally:
            subject.close()
            self.free()

    def recorded(self, name: str) -> Recorded:
        """Return the selection of the recording of a policy (the first model's by name), long enough for a session.

        Raises:
            FileNotFoundError: there is no such recording.
        """
        steps = SESSION_BLOCKS * self.config.cache.block_size
        return Recorded(Recording.load(self.recording_of(name)), steps)

    def recording_of(self, name: str) -> Path:
        """Return the file of a recording: `<name>.npz` or `<model>-<name>.npz`."""
        found = sorted([*self.traces.glob(f"{name}.npz"), *self.traces.glob(f"*-{name}.npz")])
        if not found:
            raise FileNotFoundError(f"no recording {name}.npz in {self.traces}; `bench record` makes it")
        return found[0]

    def _first_tokens(self, batch: int) -> torch.Tensor:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (batch, 1), generator=torch.Generator().manual_seed(0))
        return ids.to(self.device)

    def free(self) -> None:
        """Give cached device memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- clocks ----------------------------------------------------------------------------------------------------

    def settle(self, subject: Decoder, steps: int | None = None) -> None:
        """Run untimed steps: capture, and the steady state of the pools."""
        for _ in range(max(FIRST_WARMUP, self.scale.settle) if steps is None else steps):
            subject.step()

    def measure(self, subjects: Mapping[str, Decoder]) -> dict[str, Measured]:
        """Time single steps of the subjects in turns, two rounds."""
        rounds: dict[str, list[list[float]]] = {name: [] for name in subjects}
        totals: dict[str, dict[str, float]] = {name: {} for name in subjects}
        for i in range(ROUNDS):
            for name, subject in subjects.items():
                for _ in range(self.scale.warmup if i else max(FIRST_WARMUP, self.scale.warmup)):
                    subject.step()
                start = subject.stats()
                rounds[name].append(time_calls(subject.step, self.scale.steps // ROUNDS, self.device))
                end = subject.stats()
                for key in TOTALS if start else ():
                    totals[name][key] = totals[name].get(key, 0.0) + end[key] - start[key]
        found = {}
        for name, times in rounds.items():
            every = Quantiles.of([ms for one in times for ms in one])
            medians = [Quantiles.of(one).p50 for one in times]
            noise = (max(medians) - min(medians)) / every.p50
            per_step = {key: value / every.n for key, value in totals[name].items()}
            found[name] = Measured(every, noise, per_step)
        return found

    # ---- rows ------------------------------------------------------------------------------------------------------

    def cost(self, batch: int, context: int, *, sparse: bool, distinct: int | None = None) -> StepCost:
        """Return what a step must read; summaries of shared pages count once."""
        config = self.resolved(context) if sparse else None
        cost = step_cost(self.model, config, rows=batch, context_len_tokens=context)
        if distinct is not None and distinct < batch:
            cost = replace(cost, summary_bytes=cost.summary_bytes * distinct // batch)
        return cost

    def row(
        self,
        subject: Decoder | str,
        batch: int,
        context: int,
        measured: Measured | None = None,
        **fields: Any,
    ) -> Row:
        """Make a row: `step` with a measurement, or whatever `fields` say."""
        name = fields.pop("name", subject.name if isinstance(subject, Decoder) else subject)
        notes = [fields.pop("note", "")]
        if isinstance(subject, Decoder):
            why = subject.why_eager()
            notes += [subject.note, f"runs eagerly: {why}" if why else ""]
        row = Row(
            suite=self.suite,
            case_id=f"{self.model_name}-b{batch}-ctx{context}-{name}",
            metric="step",
            unit="ms",
            baseline=name,
            model=self.model_name,
            dtype=str(self.model.dtype).removeprefix("torch."),
            batch=batch,
            context_len_tokens=context,
            fill="random",
            note="; ".join(filter(None, notes)),
        )
        if measured is not None:
            row = self._timed(row, subject, batch, context, measured)
        return replace(row, **fields)

    def _timed(self, row: Row, subject: Decoder | str, batch: int, context: int, measured: Measured) -> Row:
        ours = isinstance(subject, Rheo)
        attends = not row.baseline.startswith("no-attention")
        cost = self.cost(batch, context, sparse=ours, distinct=getattr(subject, "distinct_rows", None))
        floor_ms = 1e3 * (cost.floor_bytes if attends else cost.weight_bytes) / self.rates.memory
        times, per_step = measured.times, measured.per_step
        row = replace(
            row, p20=times.p20, p50=times.p50, p80=times.p80, n=times.n, noise_frac=measured.noise,
            floor_ms=floor_ms, frac_of_floor=floor_ms / times.p50, flops=cost.flops, bytes_moved=0,
            weight_bytes=model_bytes(self.model),
        )  # fmt: skip
        if isinstance(subject, Decoder) and attends:
            row = replace(row, device_kv_bytes=subject.device_kv_bytes())
        if not per_step:
            return row
        selection, selected = self.resolved(context).selection, per_step["selected_blocks"]
        loaded = per_step["h2d_bytes"] + per_step["streamed_h2d_bytes"]
        return replace(
            row, block_size=self.config.cache.block_size, token_budget=int(selection.token_budget),
            method=selection.method, hit_rate=1 - per_step["miss_blocks"] / selected if selected else None,
            missed_blocks=per_step["miss_blocks"], evicted_blocks=per_step["evicted_blocks"],
            bytes_moved=loaded + per_step["d2h_bytes"] + per_step["audit_h2d_bytes"],
            link_floor_ms=1e3 * loaded / self.rates.link,
        )  # fmt: skip

    def add_with_speed(self, row: Row) -> None:
        """Emit a step row and its tok/s."""
        self.emit(row)
        if row.p50 is None or row.batch is None:
            return
        speed = Quantiles(row.p20 or 0, row.p50, row.p80 or 0, row.n).map(lambda ms: row.batch * 1e3 / ms)  # type: ignore[operator]
        self.emit(
            replace(
                row,
                metric="throughput",
                unit="tok/s",
                p20=speed.p20,
                p50=speed.p50,
                p80=speed.p80,
                target=None,
                target_met="",
            )  # fmt: skip
        )

    def failed(self, name: str, batch: int, context: int, error: Exception) -> None:
        """Emit a row that says why a case has no time."""
        status = "oom" if "emory" in type(error).__name__ else "unsupported"
        text = (str(error) or type(error).__name__).splitlines()[0]
        self.emit(self.row(name, batch, context, status=status, error=text))

    def close(self) -> None:
        """Give host and device memory back."""
        if "reservoir" in self.__dict__:
            self.reservoir.close()
        if "owner" in self.__dict__:
            self.owner.close()
        self.free()


def met(value: float, target: float, *, least: bool = False) -> dict[str, Any]:
    """Return the two target columns: value <= target, or >= when `least`."""
    good = value >= target if least else value <= target
    return {"target": target, "target_met": str(good).lower()}
