"""`rheo trace`: record which KV blocks a run selects, replay them offline, report, plan which layers can share."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rheo_offload import offload
from rheo_offload.cli import generate
from rheo_offload.cli.options import add_config_options, at_least, config_from
from rheo_offload.errors import TraceError
from rheo_offload.model.loader import load
from rheo_offload.model.specs import max_positions

# rheo_offload.trace is imported where it is used: its compiler and figures take a second that other verbs need not pay.

EXIT_INTERRUPTED = 130


def add_parser(subparsers: Any) -> None:
    """Add the `trace` verb and its parts."""
    parser = subparsers.add_parser(
        "trace",
        help="record, replay, report and plan from which KV blocks a run selects",
        description=__doc__,
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    recording = parts.add_parser("record", help="generate, and record what every step selects")
    generate.add_run_options(recording)
    recording.add_argument("--out", required=True, metavar="FILE", help="where the trace goes (.npz)")
    add_config_options(recording)
    recording.set_defaults(run=run_record)

    replaying = parts.add_parser("replay", help="hit rates of other policies and capacities, and a forecast")
    replaying.add_argument("--json", action="store_true", help="print one JSON record instead of the tables")
    replaying.set_defaults(run=run_replay)
    reporting = parts.add_parser("report", help="the same as figures and one HTML page")
    reporting.add_argument("--out", required=True, metavar="DIR", help="folder for the page and its figures")
    reporting.set_defaults(run=run_report)
    for part in (replaying, reporting):
        _add_replay_options(part)
    planning = parts.add_parser("plan", help="which layers can take the selection of an earlier one")
    planning.add_argument("trace", metavar="FILE", help="what `rheo trace record` wrote")
    planning.add_argument("--out", required=True, metavar="PLAN.json", help="file for selection.reuse_layers")
    planning.add_argument(
        "--overlap",
        type=share,
        default=0.85,
        metavar="X",
        help="least share of common blocks (default: 0.85)",
    )
    planning.set_defaults(run=run_plan)
    for part in (recording, replaying, reporting, planning):  # main adds it in front of the part only
        part.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            default=argparse.SUPPRESS,
            help="log what was decided, on stderr",
        )


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="FILE", help="what `rheo trace record` wrote")
    parser.add_argument(
        "--capacity",
        type=listed(float),
        default=[1.0, 1.25, 1.5, 2.0],
        metavar="X,...",
        help="device slots over budget (default: 1.0,1.25,1.5,2.0)",
    )
    parser.add_argument(
        "--policies",
        type=listed(str),
        metavar="P,...",
        help="of fifo, lru, lfu, heat, belady, previous-layer, perfect (default: all)",
    )
    parser.add_argument(
        "--skip", type=at_least(0), default=0, metavar="N", help="first steps left out of the figures"
    )
    parser.add_argument("--model", help="refuse the trace unless it is of this model (id or directory)")
    target = parser.add_argument_group("forecast")
    target.add_argument(
        "--link-gbs", type=above_zero, default=50.0, metavar="GB/S", help="host to device (default: 50)"
    )
    target.add_argument(
        "--hbm-gbs", type=above_zero, default=3000.0, metavar="GB/S", help="attention reads (default: 3000)"
    )
    target.add_argument(
        "--layer-us", type=above_zero, default=215.0, metavar="US",
        help="a layer without attention (default: 215, Llama-3.1-8B on one H100)",
    )  # fmt: skip
    target.add_argument(
        "--target", type=geometry, metavar="LxHxKIB",
        help="layers x KV heads x KiB per block of another model, as 32x8x32 (default: those of the trace)",
    )  # fmt: skip
    target.add_argument(
        "--batch", type=listed(at_least(1)), default=[1, 16, 64], metavar="N,...", help="default: 1,16,64"
    )


def listed(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return an argparse type: values separated by commas."""

    def values(text: str) -> list[Any]:
        return [of(part) for part in text.split(",")]

    return values


def above_zero(text: str) -> float:
    """Argparse type: a positive finite number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def share(text: str) -> float:
    """Argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


def geometry(text: str) -> tuple[int, int, float]:
    """Argparse type: `32x8x32`."""
    parts = text.lower().split("x")
    try:
        layers, heads, kib = int(parts[0]), int(parts[1]), float(parts[2])
    except (ValueError, IndexError):
        layers = heads = 0
        kib = 0.0
    if len(parts) != 3 or min(layers, heads, kib) <= 0 or kib == float("inf"):
        raise argparse.ArgumentTypeError(f"must be LAYERSxHEADSxKIB, as 32x8x32, not {text!r}")
    return layers, heads, kib


def run_record(args: argparse.Namespace) -> int:
    """Generate with a recorder attached and save the trace; what an interrupted run has is saved too."""
    from rheo_offload.trace.recorder import record

    config, prompts = config_from(args), generate.read_prompts(args)
    sampling, out = generate.sampling_options(args), Path(args.out)
    if not out.parent.is_dir():
        raise TraceError(f"cannot write {args.out!r}: {str(out.parent)!r} is no directory")
    if args.max_new_tokens < 1:
        raise TraceError("--max-new-tokens must be at least 1: a trace is made of decode steps")
    model, tokenizer = load(args.model, gguf=args.gguf, dtype=args.dtype, device=args.device)
    rows = generate.encode(prompts, tokenizer, chat=args.chat, system=args.system)
    generate.check_lengths(rows, args, max_positions(model.config))
    offload(model, config)
    torch.manual_seed(args.seed)
    tokens = generate.Recorder(tokenizer, len(rows), stream_text=False)
    interrupted = False
    with record(model) as recorder:
        try:
            generate.generate(model, tokenizer, rows, tokens, args, sampling)
        except KeyboardInterrupt:
            interrupted = True
    trace = recorder.trace()
    trace.save(out)
    misses, size = trace.misses.mean(), out.stat().st_size
    print(f"{trace.summary()}\n{misses:.3f} misses per head and step; {size / 1e3:.1f} kB in {out}")
    return EXIT_INTERRUPTED if interrupted else 0


def analysed(args: argparse.Namespace) -> Any:
    """Load and replay what `_add_replay_options` parsed."""
    from rheo_offload.trace.analysis import analyse
    from rheo_offload.trace.file import Trace
    from rheo_offload.trace.forecast import Machine
    from rheo_offload.trace.replay import PREFETCH
    from rheo_offload.trace.simulate import POLICIES

    trace = Trace.load(args.trace)
    if args.model is not None:
        from rheo_offload.cli.plan import load_config

        trace.check_config(load_config(args.model))
    layers, _, heads = trace.ids.shape[:3]
    wanted = args.target or (layers, heads, trace.meta["block_bytes"] / 1024)
    machine = Machine(
        num_layers=wanted[0],
        num_kv_heads=wanted[1],
        block_bytes=round(wanted[2] * 1024),
        link_bytes_per_s=args.link_gbs * 1e9,
        attention_bytes_per_s=args.hbm_gbs * 1e9,
        rest_of_layer_s=args.layer_us * 1e-6,
    )
    return analyse(
        trace,
        ratios=args.capacity,
        machine=machine,
        batches=args.batch,
        policies=args.policies or (*POLICIES, *PREFETCH),
        skip=args.skip,
    )


def run_replay(args: argparse.Namespace) -> int:
    """Print the tables, or one JSON record."""
    found = analysed(args)
    if args.json:
        print(json.dumps(found.record()))
        return 0
    rate, unforced = found.rates(found.run)
    print(found.trace.summary())
    if found.trace.meta.get("stopped"):
        print(f"the recording ended early: {found.trace.meta['stopped']}")
    print(f"the run, {found.run.capacity} slots: {rate:.2%} hits ({unforced:.2%} without forced blocks)")
    print(f"{found.check_line()}\n\nhit rate (without forced blocks)\n{columns(found.hit_table())}\n")
    print(f"blocks over the link per head and step\n{columns(found.link_table())}\n")
    print(f"forecast for lru: {found.assumptions()}\n{columns(found.forecast_table())}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Write the figures and the page, and print where they are."""
    from rheo_offload.trace.report import write_report

    for file in write_report(analysed(args), Path(args.out)):
        print(file)
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """Write the plan and say how many layers it lets go without a scorer."""
    from rheo_offload.trace.file import Trace
    from rheo_offload.trace.reuse import write_plan

    plan = write_plan(Trace.load(args.trace), args.overlap, Path(args.out))
    reuse = len(plan["layers"])
    least = min(plan["overlap"].values(), default=1.0)
    print(
        f"{plan['model']}: {reuse} of {plan['selecting_layers']} layers that select can reuse an earlier one "
        f"(overlap {least:.3f} or more)\nselection.reuse_layers={args.out}"
    )
    return 0


def columns(rows: list[list[str]]) -> str:
    """Lay a table out: first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
