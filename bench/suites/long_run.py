"""Many steps with requests joining and leaving: no recapture, no growth of device or host memory."""

import random
import time
from typing import Any

import psutil
import torch

from bench.lab import Lab, met
from rheo_offload.engine.engine import Engine
from rheo_offload.execution.sampler import SamplingParams

STEPS = 10_000
QUICK_STEPS = 60
ROWS = 8
PROMPT_TOKENS = (16, 1024)
NEW_TOKENS = (32, 512)
JOIN_CHANCE = 0.05  # per step, while there is a free row
SETTLED = 0.2  # share of the steps after which memory must not grow
GROWTH_BYTES = 64 << 20


def run(lab: Lab, steps: int | None = None) -> None:
    """Emit step time, captures, and how much memory grew between a fifth of the steps and the end."""
    is_cuda = lab.device.type == "cuda"
    steps = steps or (STEPS if is_cuda else QUICK_STEPS)
    rng = random.Random(11)
    shrink = 1 if is_cuda else 16
    prompt, new = ((low // min(shrink, low), high // shrink) for low, high in (PROMPT_TOKENS, NEW_TOKENS))
    small = ("selection.token_budget=512", "selection.recent_blocks=auto") if is_cuda else ()
    lab.owner.model.rheo.config = lab.config.with_overrides(small)  # a budget that prompts exceed
    with Engine(lab.owner.model, max_rows=ROWS, max_context_tokens=prompt[1] + new[1]) as engine:
        requests, settled, start = 0, (0, 0), 0.0
        while engine.steps < steps:
            if len(engine.scheduler.active) < ROWS and (engine.is_idle or rng.random() < JOIN_CHANCE):
                _submit(lab, engine, rng, prompt, new)
                requests += 1
            engine.step()
            if settled == (0, 0) and engine.steps >= SETTLED * steps:
                settled, start, first = _memory(lab), time.perf_counter(), engine.steps
        ended = _memory(lab)
        ms = 1e3 * (time.perf_counter() - start) / max(1, engine.steps - first)
        runner = engine.stepper.runner
        buckets, recaptured = len(runner.captured), runner.captures - len(runner.captured)
    note = f"{requests} requests over {steps} steps, {ROWS} rows; graphs of {buckets} buckets"
    context = prompt[1] + new[1]

    def emit(metric: str, unit: str, value: float, **fields: Any) -> None:
        lab.emit(
            lab.row(
                "engine", ROWS, context, metric=metric, unit=unit, p50=value, n=steps, note=note, **fields
            )
        )

    emit("iteration", "ms", ms)
    emit("recaptures", "1", recaptured, **met(recaptured, 0))
    for name, before, after in zip(("device", "host"), settled, ended, strict=True):
        emit(f"{name}_growth", "bytes", after - before, **met(after - before, GROWTH_BYTES))


def _submit(
    lab: Lab, engine: Engine, rng: random.Random, prompt: tuple[int, int], new: tuple[int, int]
) -> None:
    vocabulary = lab.model.get_input_embeddings().weight.shape[0]
    ids = [rng.randrange(vocabulary) for _ in range(rng.randint(*prompt))]
    sampled = rng.random() < 0.5
    params = SamplingParams(
        temperature=0.8 if sampled else 0.0,
        seed=rng.randrange(2**31),
        max_new_tokens=rng.randint(*new),
        ignore_eos=True,
    )
    engine.submit(ids, params)


def _memory(lab: Lab) -> tuple[int, int]:
    """Device memory that torch has handed out, and the process's resident host memory."""
    device = torch.cuda.memory_allocated(lab.device) if lab.device.type == "cuda" else 0
    return device, psutil.Process().memory_info().rss
