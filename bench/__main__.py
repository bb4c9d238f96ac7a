"""Command line of the benchmarks: a verb a suite, listed in bench/README.md."""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numba
import torch
import yaml

from bench import (
    fuzz,
    index_suite,
    locality_report,
    locality_suite,
    plots,
    prefetch_plot,
    prefetch_suite,
    record_suite,
    targets,
)
from bench.baselines import BASELINES, DEFAULT_BASELINES
from bench.decode import Sweep, run_decode
from bench.env import environment, machine
from bench.few_rows import table_after
from bench.fused import run_fused
from bench.gather import run_gather
from bench.kernels import INDEXED, TIMED, run_kernels, shape_of
from bench.prefetch_time import Machine
from bench.schema import Environment, Row, write_rows
from bench.sessions import ROUNDS
from bench.shapes import load_model
from bench.timing import Rates, measure_rates
from bench.tune import compile_ahead, tune, write_table
from csrc_free_kernels.launch import TABLE
from rheo_offload.config import RheoConfig
from rheo_offload.errors import RheoError

RESULTS = Path(__file__).parent / "results"
RATE_COPY_BYTES = 2**30
QUICK_RATE_COPY_BYTES = 2**24
QUICK = {
    "batch_sizes": [1, 2],
    "contexts": [192, 320],
    "steps": 4,
    "warmup": 1,
    "miss_rates": [0.0, 0.2],
    "dtype": "float32",
}
QUICK_OVERRIDES = [
    "cache.block_size=16",
    "selection.token_budget=64",
    "selection.recent_blocks=1",
    "cache.capacity_ratio=1.25",
    "cache.device_memory=floor",
    "cache.host_memory=64MiB",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite; returns the exit code: 1 when a row is wrong, 2 when the request makes no sense."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    try:
        with _one_thread() if getattr(args, "quick", False) else nullcontext():
            return args.run(args, argv)
    except (RheoError, ValueError, plots.PlotError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one CPU thread: the shapes of `--quick` only lose by more."""
    threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        numba.set_num_threads(numba_threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    suites = parser.add_subparsers(required=True, metavar="SUITE")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, help="results folder (default: bench/results/<date>-<suite>)")
    common.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    common.add_argument("--commit", help="commit to record instead of the checkout's own")
    common.add_argument(
        "--quick", action="store_true", help="a small case that a CPU finishes in under a minute"
    )

    decode = suites.add_parser(
        "decode", parents=[common], help="time of a decode step over batches and contexts"
    )
    decode.add_argument("--batch-sizes", type=_list_of(int), default=[1, 2, 4, 8], metavar="N,...")
    decode.add_argument("--contexts", type=_list_of(int), default=[4096, 16384], metavar="TOKENS,...")
    decode.add_argument("--model", help="config.json (random weights), model directory or hub id")
    decode.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    decode.add_argument("--config", default="default", help="YAML file, or the name of a packaged one")
    decode.add_argument(
        "--baselines", type=_list_of(str), default=list(DEFAULT_BASELINES), help=", ".join(BASELINES)
    )
    decode.add_argument("--steps", type=int, default=32, help="timed steps per case")
    decode.add_argument("--warmup", type=int, default=8, help="steps ahead of every timed round")
    decode.add_argument(
        "--fill", choices=("prefill", "random"), default="prefill", help="where the context comes from"
    )
    decode.add_argument(
        "--forced-miss-rates", dest="miss_rates", type=_list_of(float), default=[0.0], metavar="R,..."
    )
    decode.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration, as selection.token_budget=4096"
    )
    decode.set_defaults(run=_decode)

    fused = suites.add_parser(
        "fused", parents=[common], help="the step without attention, own modules against fused ones"
    )
    fused.add_argument("--batch-sizes", type=_list_of(int), default=[1, 16, 64], metavar="N,...")
    fused.add_argument("--model", default="configs/models/llama-3.1-8b.json", help="as in decode")
    fused.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    fused.add_argument("--steps", type=int, default=50, help="timed steps per case")
    fused.add_argument(
        "--tune",
        action="store_true",
        help="also write where linear_few won into the launch table (beside --out's rows, else the package's)",
    )
    fused.set_defaults(run=_fused)

    fuzzing = suites.add_parser(
        "fuzz", parents=[common], help="captured against eager steps under one random schedule, bit for bit"
    )
    fuzzing.add_argument("--steps", type=int, default=2000, help="engine iterations (--quick: 60)")
    fuzzing.set_defaults(run=_fuzz)

    gather = suites.add_parser(
        "gather", parents=[common], help="the copy of scattered blocks from host memory"
    )
    gather.set_defaults(run=_gather)

    targets.add_parser(suites, common, _targets)
    record_suite.add_parser(suites, common)
    prefetch_suite.add_parser(suites, common, _prefetch)
    locality_suite.add_parser(suites, common, _locality)
    index_suite.add_parser(suites, common, _index, _list_of)

    kernels = suites.add_parser("kernels", parents=[common], help="the ops of a decode step, one by one")
    kernels.add_argument("--batch-sizes", type=_list_of(int), default=[1, 8, 16, 32, 64], metavar="N,...")
    kernels.add_argument("--blocks", type=_list_of(int), default=[256, 2048], metavar="N,...")
    kernels.add_argument("--block-size", type=int, default=64, metavar="TOKENS", help="default: 64")
    kernels.add_argument(
        "--ops", type=_list_of(str), default=[*TIMED, *INDEXED], metavar="OP,...", help="default: all"
    )
    kernels.add_argument(
        "--tune",
        action="store_true",
        help="write this device's launch table instead (to --out, else the package)",
    )
    kernels.add_argument("--jobs", type=int, default=0, help="processes that compile ahead; 0: none")
    kernels.set_defaults(run=_kernels)

    plot = suites.add_parser("plot", help="draw the figures of a results folder again")
    plot.add_argument("folder", type=Path)
    plot.set_defaults(run=_plot)
    return parser


def _list_of(kind: Callable[[str], object]) -> Callable[[str], list[object]]:
    def parse(text: str) -> list[object]:
        return [kind(item) for item in text.split(",") if item]

    return parse


class _Results:
    """The results folder; rows are printed and saved as they come, so an aborted run keeps what it has."""

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder, self.environment = folder, environment
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(describe(row), flush=True)
        write_rows(self.folder / "rows.csv", self.rows, self.environment)

    def extend(self, rows: Sequence[Row]) -> None:
        """Save rows whose suite prints a table of its own."""
        self.rows += rows
        write_rows(self.folder / "rows.csv", self.rows, self.environment)

    def save(self, device: torch.device, rates: dict[str, float], settings: dict[str, object]) -> None:
        info = asdict(self.environment) | machine(device) | {"measured_bytes_per_s": rates}
        (self.folder / "env.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        (self.folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")

    def exit_code(self) -> int:
        return 1 if any(row.status == "wrong" for row in self.rows) else 0


def describe(row: Row) -> str:
    """Return a row as one printed line, the bytes moved beside every number."""
    if row.status != "ok":
        return f"{row.case_id}: {row.status}: {row.error}"
    parts = [f"{row.case_id}: {row.metric} {row.p50:.4g} {row.unit}"]
    if row.p20 is not None:
        parts.append(f"[{row.p20:.4g}, {row.p80:.4g}] n={row.n}")
    if row.target is not None:
        parts.append(f"target {row.target:.4g} {'met' if row.target_met == 'true' else 'MISSED'}")
    if row.frac_of_floor is not None and row.floor_ms is not None:
        parts.append(f"floor {row.floor_ms:.3g} ms (at {row.frac_of_floor:.0%} of its speed)")
    if row.bytes_moved is not None:
        parts.append(f"moved {row.bytes_moved / 1e6:.3g} MB (link floor {row.link_floor_ms or 0:.3g} ms)")
    if row.hit_rate is not None:
        parts.append(
            f"hits {row.hit_rate:.1%}, missed {row.missed_blocks:.4g}, evicted {row.evicted_blocks:.4g}"
        )
    if row.peak_device_bytes is not None:
        beyond = row.peak_device_bytes - (row.weight_bytes or 0)
        parts.append(f"peak {row.peak_device_bytes / 2**30:.2f} GiB (weights + {beyond / 2**30:.2f})")
    if row.note:
        parts.append(row.note)
    return " | ".join(parts)


def _device(args: argparse.Namespace) -> torch.device:
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(args.device)


def _results(args: argparse.Namespace, argv: Sequence[str], suite: str, device: torch.device) -> _Results:
    folder = args.out or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{suite}"
    return _Results(folder, environment(device, argv, args.commit))


def _decode(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(args)
    overrides = list(args.overrides)
    if args.quick:
        vars(args).update(QUICK)
        overrides = QUICK_OVERRIDES + overrides
    if unknown := sorted(set(args.baselines) - set(BASELINES)):
        raise ValueError(f"unknown baselines {unknown}; known: {', '.join(BASELINES)}")
    config = RheoConfig.from_yaml(args.config).with_overrides(overrides)
    if min(args.batch_sizes + args.contexts, default=0) < 1 or args.steps < ROUNDS or args.warmup < 1:
        raise ValueError(f"batch sizes, contexts and --warmup must be at least 1, --steps at least {ROUNDS}")
    if args.model is None and not args.quick:
        raise ValueError("--model is missing (for example configs/models/llama-3.1-8b.json), or --quick")
    model = load_model(args.model, device, getattr(torch, args.dtype))
    results = _results(args, argv, "decode", device)
    rates = measure_rates(device, QUICK_RATE_COPY_BYTES if args.quick else RATE_COPY_BYTES)
    sweep = Sweep(
        model=model,
        model_name=Path(args.model).stem if args.model else "quick",
        config=config,
        rates=rates,
        fill=args.fill,
        warmup=args.warmup,
        steps=args.steps,
        miss_rates=args.miss_rates,
        baselines=args.baselines,
    )
    settings = {
        key: value for key, value in vars(args).items() if key not in ("run", "overrides", "out", "commit")
    }
    resolved = {context: sweep.resolved(context).to_dict() for context in args.contexts}
    results.save(device, asdict(rates), {"bench": settings, "rheo": config.to_dict(), "resolved": resolved})
    run_decode(sweep, args.batch_sizes, args.contexts, results.add)
    _draw(results.folder)
    return results.exit_code()


def _fused(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(args)
    if args.quick:
        vars(args).update(model=None, batch_sizes=[1, 2], steps=5, dtype="float32")
    model = load_model(args.model, device, getattr(torch, args.dtype))
    results = _results(args, argv, "fused", device)
    rates = measure_rates(device, QUICK_RATE_COPY_BYTES if args.quick else RATE_COPY_BYTES)
    name = Path(args.model).stem if args.model else "quick"
    settings = {key: vars(args)[key] for key in ("model", "dtype", "batch_sizes", "steps", "quick")}
    results.save(device, asdict(rates), {"bench": {"suite": "fused"} | settings})
    products = run_fused(model, name, args.batch_sizes, args.steps, rates, results.add)
    if args.tune:
        path = args.out / TABLE.name if args.out else TABLE
        write_table(table_after(products, device), path)
        print(f"launch table written to {path}")
    return results.exit_code()


def _fuzz(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(args)
    folder = args.out or RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    report = fuzz.run(device, 60 if args.quick else args.steps)
    fuzz.write_report(folder / "fuzz.json", report, environment(device, argv, args.commit))
    print(report)
    return 0 if report.ok else 1


def _gather(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(args)
    results = _results(args, argv, "gather", device)
    rates: Rates = run_gather(args.quick, device, results.add)
    results.save(
        device, asdict(rates), {"bench": {"suite": "gather", "quick": args.quick, "device": args.device}}
    )
    return results.exit_code()


def _prefetch(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = torch.device("cpu")
    results = _results(args, argv, "prefetch", device)
    settings = {key: getattr(args, key) for key in ("capacity", "policies", "skip")}
    settings["recordings"] = [path.name for path in prefetch_suite.files_of(args.recordings)]
    results.save(device, {}, {"bench": settings, "machine": asdict(Machine())})
    prefetch_suite.run_prefetch(args, results.extend)
    prefetch_plot.draw(results.folder)
    return results.exit_code()


def _locality(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(args)
    settings = locality_suite.settings_of(args)
    results = _results(args, argv, "locality", device)
    results.save(device, {}, {"bench": settings})
    locality_suite.run_locality(args, device, results.extend)
    locality_report.write(results.folder)
    return results.exit_code()


def _index(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = torch.device("cpu")
    results = _results(args, argv, "index", device)
    keys = ("model", "texts", "prompt_tokens", "steps", "block_size", "token_budgets", "groups", "keep")
    index_suite.run_index(args, device, results.add)
    results.save(device, {}, {"bench": {"suite": "index", **{key: vars(args)[key] for key in keys}}})
    return results.exit_code()


def _kernels(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(args)
    if args.quick:
        args.batch_sizes, args.blocks = [1, 2], [12]
    if args.tune:
        path = args.out / TABLE.name if args.out else TABLE
        path.parent.mkdir(parents=True, exist_ok=True)
        tune(args.batch_sizes, args.blocks, args.quick, device, path, args.jobs)
        return 0
    if unknown := set(args.ops) - {*TIMED, *INDEXED}:
        raise SystemExit(f"unknown ops: {', '.join(sorted(unknown))}; known: {', '.join((*TIMED, *INDEXED))}")
    cases = itertools.product(args.blocks, args.batch_sizes)
    shapes = [shape_of(rows, blocks, args.quick, args.block_size) for blocks, rows in cases]
    compile_ahead([(shape, 1, "all", {}, device) for shape in shapes], args.jobs)
    results = _results(args, argv, "kernels", device)
    rates = run_kernels(shapes, device, results.add, args.ops)
    keys = ("batch_sizes", "blocks", "block_size", "ops", "quick", "device")
    settings = {key: vars(args)[key] for key in keys}
    results.save(device, asdict(rates), {"bench": {"suite": "kernels", **settings}})
    return results.exit_code()


def _targets(args: argparse.Namespace, argv: Sequence[str]) -> int:
    device = _device(args)
    return targets.run(args, device, QUICK_OVERRIDES, lambda: _results(args, argv, "targets", device))


def _plot(args: argparse.Namespace, argv: Sequence[str]) -> int:
    for path in plots.draw(args.folder):
        print(path)
    return 0


def _draw(folder: Path) -> None:
    """Draw what the rows allow; a missing matplotlib costs the figures, not the results."""
    try:
        for path in plots.draw(folder):
            print(path)
    except plots.PlotError as error:
        print(f"no figures: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
