"""The same random schedule run twice, with captured and with eager steps: tokens, tables and counters must be equal.

Requests are admitted, end, are cancelled and grow; blocks are dropped, slots are shared anew, tables grow (which is the
one thing that captures anew). After every step both caches are compared bit for bit, heat and pools included.
"""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.shapes import quick_config, random_model
from rheo_offload.config import RheoConfig
from rheo_offload.engine.engine import Engine
from rheo_offload.engine.request import Request
from rheo_offload.execution.sampler import SamplingParams
from rheo_offload.model.offload import offload, restore

COMPARED = ("slot_of", "block_in", "last_used", "heat", "counters", "traffic")


@dataclass(slots=True, kw_only=True)
class FuzzReport:
    """What was done and what came out."""

    steps: int = 0
    events: dict[str, int] = field(default_factory=dict)
    tokens_compared: int = 0
    tables_compared: int = 0
    evicted_blocks: int = 0
    loaded_bytes: int = 0
    captures: int = 0
    buckets: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything was equal and blocks really moved."""
        return not self.differences and self.evicted_blocks > 0 and self.loaded_bytes > 0


# Blocks of 16 tokens and a pool as small as it may be: blocks are evicted and loaded all the time.
TIGHT = (
    "cache.block_size=16",
    "cache.host_memory=256MiB",
    "cache.device_memory=floor",
    "cache.capacity_ratio=1.0",
    "selection.token_budget=96",
    "selection.recent_blocks=2",
    "selection.query_agnostic_share=0.25",
    "prefill.chunk_tokens=48",
)


def run(device: torch.device, steps: int) -> FuzzReport:
    """Fuzz a small fp32 model with random weights."""
    return fuzz(
        lambda: random_model(quick_config(), device, torch.float32),
        RheoConfig().with_overrides(TIGHT),
        steps=steps,
    )


def fuzz(
    make_model: Callable[[], PreTrainedModel],
    config: RheoConfig,
    *,
    steps: int,
    max_rows: int = 8,
    context: int = 320,
    seed: int = 0,
) -> FuzzReport:
    """Run a schedule of `steps` steps over two engines and compare them after each.

    Args:
        make_model: returns the same model twice (same weights).
        config: of both; `execution.graph` is set here. A tight one, so that blocks are evicted.
        steps: engine iterations.
        max_rows: rows of both engines.
        context: longest request, in tokens.
        seed: of the schedule.
    """
    models = [make_model() for _ in range(2)]
    for model, graph in zip(models, ("auto", "off"), strict=True):
        offload(model, config.with_overrides([f"execution.graph={graph}", "audit.every=0"]))
    report, events = FuzzReport(), Counter[str]()
    twins = [Engine(model, max_rows=max_rows, max_context_tokens=context) for model in models]
    try:
        schedule = _Schedule(twins, random.Random(seed), context, events)
        for _ in range(steps):
            schedule.before_step()
            for engine in twins:
                engine.step()
            report.steps += 1
            _compare(twins, schedule.requests, report)
            if len(report.differences) > 10:
                break
        kv = twins[0].stats()
        report.evicted_blocks, report.loaded_bytes = kv.evicted_blocks, kv.h2d_bytes
        runner = twins[0].stepper.runner
        report.captures, report.buckets = runner.captures, sorted(f"{b} {v}" for b, v in runner.captured)
        report.events = dict(events)
    finally:
        for engine, model in zip(twins, models, strict=True):
            engine.close()
            restore(model)
    return report


class _Schedule:
    """What happens between two steps, the same to both engines."""

    def __init__(self, twins: list[Engine], rng: random.Random, context: int, events: Counter[str]) -> None:
        self.twins, self.rng, self.context, self.events = twins, rng, context, events
        self.requests: list[list[Request]] = []
        self.quiet = 0  # steps for which nothing joins, so that the batch shrinks too

    def before_step(self) -> None:
        rng = self.rng
        self.quiet = max(0, self.quiet - 1)
        if rng.random() < 0.005:
            self.quiet = 40
        if self.quiet == 0 and rng.random() < 0.25:
            self._submit()
        if self.requests and rng.random() < 0.01:
            pair = rng.choice(self.requests)
            if not pair[0].is_done:
                self.events["cancelled"] += 1
                for engine, request in zip(self.twins, pair, strict=True):
                    engine.cancel(request.id)
        if rng.random() < 0.1:
            self._drop()
        if rng.random() < 0.003:
            self.events["tables grown"] += 1
            for engine in self.twins:
                ex = engine.cache.executor
                ex.make_room(ex.cache.max_blocks * ex.cache.block_size + 1)

    def _submit(self) -> None:
        rng = self.rng
        prompt = rng.choice([1, 2, 17, 64, 130, 250])
        new = rng.randint(1, min(64, self.context - prompt))
        sampled = rng.random() < 0.3
        params = SamplingParams(
            max_new_tokens=new,
            temperature=0.8 if sampled else 0.0,
            top_k=20 if sampled else 0,
            seed=rng.randrange(2**31),
            ignore_eos=rng.random() < 0.7,
        )
        ids = [rng.randrange(3, 90) for _ in range(prompt)]
        self.events["admitted"] += 1
        self.requests.append([engine.submit(ids, params) for engine in self.twins])

    def _drop(self) -> None:
        """Drop the same random blocks on both sides."""
        self.events["blocks dropped"] += 1
        seed = self.rng.randrange(2**31)
        for engine in self.twins:
            kv = engine.cache.executor.cache
            kv.drop_blocks(0.5, torch.Generator(kv.device).manual_seed(seed))


def _compare(twins: list[Engine], requests: list[list[Request]], report: FuzzReport) -> None:
    step = report.steps
    for one, other in requests:
        report.tokens_compared += len(one.output_ids)
        if (one.output_ids, one.state, one.row) != (other.output_ids, other.state, other.row):
            report.differences.append(f"step {step}: request {one.id} differs")
    requests[:] = [pair for pair in requests if not pair[0].is_done]
    caches = [engine.cache.executor.cache for engine in twins]
    if not torch.equal(caches[0].seq_lens, caches[1].seq_lens):
        report.differences.append(f"step {step}: lengths differ")
    for i, layer in caches[0].full.items():
        for name in COMPARED:
            report.tables_compared += 1
            if not torch.equal(getattr(layer, name), getattr(caches[1].full[i], name)):
                report.differences.append(f"step {step}, layer {i}: {name} differs")


def write_report(path: Path, report: FuzzReport, environment: Any) -> None:
    """Write the report and where it ran as JSON."""
    path.write_text(json.dumps(asdict(report) | {"environment": asdict(environment)}, indent=1) + "\n")
