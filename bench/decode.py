"""The decode suite: time of a step over batch sizes and contexts, ours and the baselines', with its floor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from bench.baselines import Rheo
from bench.decoder import HFOffloaded
from bench.gate import dense_gate, gate
from bench.ours import OURS
from bench.schema import Row
from bench.sessions import Session, Task, measure
from bench.shapes import model_bytes, step_cost
from bench.timing import Quantiles, Rates
from rheo_offload.config import RheoConfig, resolve_auto

GATE_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What all cases of a run share."""

    model: PreTrainedModel
    model_name: str
    config: RheoConfig
    rates: Rates
    fill: str
    warmup: int
    steps: int
    miss_rates: Sequence[float]
    """Shares of the droppable blocks dropped before every step; 0 = as it comes."""
    baselines: Sequence[str]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def resolved(self, context_len_tokens: int) -> RheoConfig:
        """Return the configuration of a context."""
        return resolve_auto(
            self.config, context_len_tokens=context_len_tokens, device_type=self.model.device.type
        )


def run_decode(
    sweep: Sweep, batches: Sequence[int], contexts: Sequence[int], add: Callable[[Row], None]
) -> None:
    """Measure every case, handing each row to `add` as soon as it exists."""
    gates: dict[tuple[int, str], str] = {}
    for context in contexts:
        config = sweep.resolved(context)
        for batch in batches:
            task = Task(
                model=sweep.model,
                config=config,
                batch=batch,
                context_len_tokens=context,
                fill=sweep.fill,
                warmup=sweep.warmup,
                steps=sweep.steps,
                miss_rates=sweep.miss_rates,
                baselines=sweep.baselines,
            )
            if context <= task.session_steps:
                raise ValueError(
                    f"context {context} is shorter than the {task.session_steps} steps of a session"
                )
            key = (min(batch, GATE_ROWS), config.to_yaml())
            if key not in gates:
                shape = (sweep.model.config, config, sweep.device, key[0])
                has_dense = any(name.startswith("dense-graph") for name in sweep.baselines)
                gates[key] = gate(*shape) or (dense_gate(*shape) if has_dense else "")
            if gates[key]:
                add(replace(_case_row(sweep, task, Rheo.name, 0.0), status="wrong", error=gates[key]))
                continue
            for session in measure(task):
                for row in _session_rows(sweep, task, session):
                    add(row)


def _case_row(sweep: Sweep, task: Task, subject: str, miss_rate: float) -> Row:
    """The columns of a case, and the floor of its steps."""
    config = task.config
    ours, attends = subject in OURS, not subject.startswith("no-attention")
    cost = step_cost(
        task.model, config if ours else None, rows=task.batch, context_len_tokens=task.context_len_tokens
    )
    floor_bytes = cost.floor_bytes if attends else cost.weight_bytes
    suffix = f"-miss{miss_rate:g}" if miss_rate else ""
    row = Row(
        suite="decode",
        case_id=f"{sweep.model_name}-b{task.batch}-ctx{task.context_len_tokens}-{subject}{suffix}",
        metric="step",
        unit="ms",
        baseline=subject,
        bytes_moved=0,
        flops=cost.flops,
        floor_ms=1e3 * floor_bytes / sweep.rates.memory,
        link_floor_ms=0,
        model=sweep.model_name,
        dtype=str(task.model.dtype).removeprefix("torch."),
        batch=task.batch,
        context_len_tokens=task.context_len_tokens,
        fill=task.fill,
    )
    if subject == HFOffloaded.name:
        # Every layer is fetched for the step and written back whole after it.
        link_ms = 1e3 * cost.kv_bytes / sweep.rates.link
        return replace(row, bytes_moved=2 * cost.kv_bytes, link_floor_ms=link_ms)
    if ours:
        selection = config.selection
        return replace(
            row,
            block_size=config.cache.block_size,
            token_budget=int(selection.token_budget),
            cpu_share=0,
            method=selection.method,
            forced_miss_rate=miss_rate,
        )
    return row


def _session_rows(sweep: Sweep, task: Task, session: Session) -> Iterator[Row]:
    if session.status != "ok":
        yield replace(_case_row(sweep, task, session.name, 0.0), status=session.status, error=session.error)
        return
    for miss_rate, rounds in session.rounds.items():
        times = Quantiles.of([ms for one in rounds for ms in one])
        medians = [Quantiles.of(one).p50 for one in rounds]
        row = _case_row(sweep, task, session.name, miss_rate)
        row = _with_counters(row, sweep, session, miss_rate, times.n)
        row = replace(
            row,
            n=times.n,
            frac_of_floor=(row.floor_ms or 0) / times.p50,
            noise_frac=(max(medians) - min(medians)) / times.p50,
            device_kv_bytes=session.device_kv_bytes,
            weight_bytes=model_bytes(task.model),
            note=session.note,
            peak_device_bytes=session.peak_bytes,
        )
        yield replace(row, p20=times.p20, p50=times.p50, p80=times.p80)
        if not session.name.startswith("no-attention"):
            speed = times.map(lambda ms: task.batch * 1e3 / ms)
            yield replace(row, metric="throughput", unit="tok/s", p20=speed.p20, p50=speed.p50, p80=speed.p80)
    for part, ms in session.split_ms.items():
        row = _case_row(sweep, task, session.name, 0.0)
        row = replace(row, bytes_moved=None, flops=None, floor_ms=None, link_floor_ms=None)
        yield replace(row, metric=f"part.{part}", unit="1" if part == "launches" else "ms", p50=ms, n=1)


def _with_counters(row: Row, sweep: Sweep, session: Session, miss_rate: float, steps: int) -> Row:
    totals = session.totals[miss_rate]
    if not totals:
        return row
    per_step = {key: value / steps for key, value in totals.items()}
    selected = per_step["selected_blocks"]
    needed_bytes = per_step["h2d_bytes"] + per_step["streamed_h2d_bytes"]
    return replace(
        row,
        hit_rate=1 - per_step["miss_blocks"] / selected if selected else None,
        missed_blocks=per_step["miss_blocks"],
        evicted_blocks=per_step["evicted_blocks"],
        bytes_moved=needed_bytes + per_step["audit_h2d_bytes"] + per_step["d2h_bytes"],
        link_floor_ms=1e3 * needed_bytes / sweep.rates.link,
        captured_mass=session.captured_mass,
    )
