"""The launch table: every candidate timed in a captured graph of 32 layers, the best written down."""

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.kernels import INDEXED, TIMED, Layer, Shape, Step, shape_of
from bench.timing import Quantiles
from csrc_free_kernels import launch

Job = tuple[Shape, int, str, dict[str, int], torch.device]  # splits, op and what its entry says

# The tuner times steps without misses. With some, programs that load take places on the multiprocessors, and other
# splits may be best: B=64 at 1 % misses 19.79 ms with one split, 19.63 with two. The packaged splits weigh both.
# What the tuner tries: warps, stages and tokens a tile of attention, and its splits; warps and programs of scoring.
ATTEND = ((4, 3, 64), (4, 4, 64), (2, 3, 64), (2, 4, 32), (4, 4, 32), (1, 4, 32))
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
WARPS, PROGRAMS = (1, 2, 4, 8, 16), (264, 528, 1056)


def tune(
    batches: list[int], blocks: list[int], quick: bool, device: torch.device, path: Path, processes: int
) -> None:
    """Time every candidate and write a table with the best in place of what it said of these shapes.

    Args:
        processes: that compile the candidates ahead, into Triton's cache on disk; 0: compile as they come.
    """
    before = list(launch.entries())
    shapes = [shape_of(rows, num_blocks, quick) for rows in batches for num_blocks in blocks]
    jobs = [
        (s, splits, "attend", use)
        for s in shapes
        if s.blocks == min(blocks)
        for splits, use in attend_candidates(s)
    ]
    jobs += [(s, 1, "decide", use) for s in shapes for use in decide_candidates(s)]
    compile_ahead([(*job, device) for job in jobs], processes)
    try:
        for rows in batches:
            _tune_attend(shape_of(rows, min(blocks), quick), device, 2 if quick else 5)
            for num_blocks in blocks:
                _tune_decide(shape_of(rows, num_blocks, quick), device, 2 if quick else 5)
        write_table(launch.entries(), path)
    finally:
        launch.replace(before)


def write_table(table: list[dict[str, Any]], path: Path) -> None:
    """Write a launch table, an entry a line."""
    table = sorted(table, key=lambda e: (e["op"], e["arch"], sorted(e["features"].items()), e["heads"]))
    path.write_text("[" + ",\n ".join(json.dumps(e) for e in table) + "]\n", encoding="utf-8")


def compile_ahead(jobs: list[Job], processes: int) -> None:
    """Compile what the jobs launch, in several processes; with an empty `use`, every op as the table has it."""
    if processes > 0:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(_compile, jobs))


def _compile(job: Job) -> None:
    s, splits, op, use, device = job
    step, pairs = Step(s, device, count=1), s.rows * s.heads
    x = step.layers[0]
    try:
        if op == "attend":
            with (
                launch.candidate("attend", device, pairs, attend_features(s), use),
                launch.candidate("attend_splits", device, pairs, {}, {"programs": splits * pairs}),
            ):
                step.split()
                step.attend_and_merge(x)
        elif op == "decide":
            with launch.candidate("decide", device, pairs, decide_features(s), use):
                step.decide(x)
        else:
            for name in (*TIMED, *(INDEXED if step.opened else ())):
                getattr(step, name)(x)
    except Exception as error:  # told again, with its time missing, when it is tried
        print(f"does not run: {op} {use}: {type(error).__name__}: {error}")


def attend_candidates(s: Shape) -> Iterator[tuple[int, dict[str, int]]]:
    """Splits, about those that fill the device, and what else an entry of `attend` may say."""
    fair = min(max(1.0, launch.PROGRAMS / (s.rows * s.heads)), launch.MAX_SPLITS)
    for splits in sorted({min(n, s.budget) for n in SPLITS if fair / 2.1 <= n <= fair * 2.1}):
        for warps, stages, tokens in ATTEND:
            yield splits, {"num_warps": warps, "num_stages": stages, "tokens": tokens}


def decide_candidates(s: Shape) -> Iterator[dict[str, int]]:
    """What an entry of `decide` may say: warps that hold 2 to 32 blocks a thread."""
    for warps, programs in itertools.product(WARPS, PROGRAMS):
        if 2 <= s.blocks / (32 * warps) <= 32 or warps == 1 > s.blocks / 64:
            yield {"num_warps": warps, "programs": programs}


def _tune_attend(s: Shape, device: torch.device, samples: int) -> None:
    """Attention, its splits and the merge together, as they trade against each other."""
    pairs, features = s.rows * s.heads, attend_features(s)
    step = Step(s, device)
    results = []
    for splits, use in attend_candidates(s):
        with (
            launch.candidate("attend", device, pairs, features, use),
            launch.candidate("attend_splits", device, pairs, {}, {"programs": splits * pairs}),
        ):
            step.split()
            results.append((_median_us(step, step.attend_and_merge, samples), splits, use))
    _report(f"attend+merge b{s.rows}", results)
    _, splits, use = min(results, key=lambda r: r[0])
    launch.put("attend", device, pairs, features, use)
    launch.put("attend_splits", device, pairs, {}, {"programs": splits * pairs})


def decide_features(s: Shape) -> dict[str, int]:
    """What an entry of `decide` must match: its blocks, rounded up to a power of two."""
    return {"blocks": 1 << (s.blocks - 1).bit_length()}


def attend_features(s: Shape) -> dict[str, int]:
    """What an entry of `attend` must match."""
    return {"dim": s.dim, "block_size": s.block_size, "itemsize": s.dtype.itemsize}


def _tune_decide(s: Shape, device: torch.device, samples: int) -> None:
    pairs, features = s.rows * s.heads, decide_features(s)
    step = Step(s, device)
    results = []
    for use in decide_candidates(s):
        with launch.candidate("decide", device, pairs, features, use):
            results.append((_median_us(step, step.decide, samples), use))
    _report(f"decide b{s.rows} n{s.blocks}", results)
    best_us, use = min(results, key=lambda r: r[0])
    if best_us < float("inf"):
        launch.put("decide", device, pairs, features, use)


def _median_us(step: Step, fn: Callable[[Layer], None], samples: int) -> float:
    try:
        return 1e3 * Quantiles.of(step.time_ms(fn, samples)).p50
    except Exception as error:  # a candidate that does not fit this device is no candidate
        print(f"skipped: {type(error).__name__}: {error}")
        return float("inf")


def _report(name: str, results: list[tuple]) -> None:
    for result in sorted(results, key=lambda r: r[0])[:5]:
        print(f"{name}: {result[0]:.2f} us {result[1:]}", flush=True)
