"""`python -m bench targets SUITE...`: the suites behind the table of targets, in one process over one model."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.gate import dense_gate, gate
from bench.lab import FULL, QUICK, Lab
from bench.schema import Row
from bench.shapes import load_model, merge_weights
from bench.suites import SUITES
from bench.timing import measure_rates
from rheo_offload.config import RheoConfig

GATE_ROWS = 3
TRACES = Path(__file__).parent / "traces"
COMMON = ("cache.device_memory=floor", "audit.every=0")
FULL_OVERRIDES = ("cache.block_size=64", "selection.token_budget=4096", "cache.capacity_ratio=1.5")


def add_parser(suites: Any, common: argparse.ArgumentParser, run: Callable[..., int]) -> None:
    """Add the `targets` verb; `run` is what it calls."""
    parser = suites.add_parser("targets", parents=[common], help="the table of targets, suite by suite")
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE | key=value", help=f"of {', '.join(SUITES)}; default: all"
    )
    parser.add_argument("--model", help="config.json (random weights), model directory or hub id")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--traces", type=Path, default=TRACES, help="recordings (default: %(default)s)")
    parser.add_argument(
        "--reservoir", metavar="GIB", type=float, help="host memory that suites other than memory fill"
    )
    parser.add_argument(
        "--contexts", metavar="N,...", help="contexts of the memory suite, in this order (default: all)"
    )
    parser.set_defaults(run=run)


def run(
    args: argparse.Namespace,
    device: torch.device,
    quick_overrides: Sequence[str],
    open_results: Callable[[], Any],
) -> int:
    """Run the suites; returns the exit code.

    Args:
        args: of `add_parser`.
        device: where the model goes.
        quick_overrides: configuration of `--quick`.
        open_results: makes the results folder, once the request has proved sensible.
    """
    words = [word for word in args.suites if "=" not in word]
    overrides = [word for word in args.suites if "=" in word]
    if unknown := sorted(set(words) - set(SUITES)):
        raise ValueError(f"unknown suites {unknown}; known: {', '.join(SUITES)}")
    if args.model is None and not args.quick:
        raise ValueError("--model is missing (for example configs/models/llama-3.1-8b.json), or --quick")
    scale = QUICK if args.quick else FULL
    if args.reservoir is not None:
        scale = replace(scale, reservoir_bytes=int(args.reservoir * 2**30))
    if args.contexts is not None:
        if not all(n.isdecimal() and int(n) for n in args.contexts.split(",")):
            raise ValueError(f"--contexts must be numbers of tokens, as 32768,16384, not {args.contexts!r}")
        scale = replace(scale, memory_contexts=tuple(int(n) for n in args.contexts.split(",")))
    base = quick_overrides if args.quick else FULL_OVERRIDES
    config = RheoConfig().with_overrides([*base, *COMMON, *overrides])
    clock = time.perf_counter()
    model = load_model(args.model, device, torch.float32 if args.quick else getattr(torch, args.dtype))
    merge_weights(model)
    results = open_results()
    rates = measure_rates(device, 2**24 if args.quick else 2**30)
    print(f"model and rates: {time.perf_counter() - clock:.1f} s", flush=True)
    lab = Lab(
        model=model,
        model_name=Path(args.model).stem if args.model else "quick",
        config=config,
        rates=rates,
        scale=scale,
        traces=args.traces,
        emit=results.add,
    )
    settings = {"suites": words or list(SUITES), "quick": args.quick, "scale": asdict(scale)}
    resolved = {scale.short: lab.resolved(scale.short).to_dict()}
    results.save(device, asdict(rates), {"bench": settings, "rheo": config.to_dict(), "resolved": resolved})
    try:
        with torch.no_grad():
            _run_suites(lab, words or list(SUITES))
    finally:
        lab.close()
    return int(results.exit_code())


def _run_suites(lab: Lab, names: Sequence[str]) -> None:
    config = lab.resolved(lab.scale.short)
    problem = gate(lab.model.config, config, lab.device, GATE_ROWS) or dense_gate(
        lab.model.config, config, lab.device, GATE_ROWS
    )
    for name in names:
        lab.suite = name
        if problem:
            lab.emit(
                Row(
                    suite=name,
                    case_id=f"{lab.model_name}-gate",
                    metric="step",
                    unit="ms",
                    status="wrong",
                    error=problem,
                )
            )
            continue
        print(f"== {name}", flush=True)
        clock = time.perf_counter()
        SUITES[name](lab)
        print(f"== {name} took {time.perf_counter() - clock:.1f} s", flush=True)
