"""`rheo calibrate`: fit learned heads to a frozen model from its own attention on text, into a side file."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rheo_offload.cli.options import at_least
from rheo_offload.errors import CalibrationError
from rheo_offload.model.loader import load

# rheo_offload.calibration is imported where it is used: other verbs need not pay for it.


def add_parser(subparsers: Any) -> None:
    """Add the `calibrate` verb."""
    parser = subparsers.add_parser(
        "calibrate", help="fit the learned heads of nosa and seer_r to a model", description=__doc__
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id or local directory")
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file inside that directory")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="text to fit on, UTF-8")
    parser.add_argument("--out", required=True, metavar="SIDE.safetensors", help="where the heads go")
    parser.add_argument("--kind", choices=("eviction", "gate", "both"), default="both")
    parser.add_argument(
        "--target", choices=("peak", "mass"), default="peak",
        help="of the gate: largest attention weight on a block (as published), or all of it",
    )  # fmt: skip
    parser.add_argument("--context", type=at_least(256), default=8192, metavar="N", help="tokens a window")
    parser.add_argument(
        "--windows", type=at_least(3), default=32, metavar="N", help="at most; the last two are held out"
    )
    parser.add_argument("--block-size", type=block_size, default=64, metavar="N", help="cache.block_size")
    parser.add_argument(
        "--budget", type=at_least(1), metavar="N", help="tokens a step attends to (default: a quarter window)"
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=400, metavar="N", help="of the optimiser at most"
    )
    parser.add_argument("--lr", type=above_zero, metavar="X", help="learning rate (default: by kind of head)")
    parser.add_argument("--queries", type=at_least(8), default=512, metavar="N", help="kept of every window")
    parser.add_argument(
        "--score-steps", type=at_least(2), default=192, metavar="N", help="steps of the score"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON record instead of the table")
    parser.set_defaults(run=run)


def block_size(text: str) -> int:
    """Argparse type: a power of two, 16 to 256."""
    value = int(text)
    if not 16 <= value <= 256 or value & (value - 1):
        raise argparse.ArgumentTypeError(f"must be a power of two, 16 to 256, not {value}")
    return value


def above_zero(text: str) -> float:
    """Argparse type: a positive finite number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without weights, load, fit, save, and print the score."""
    from rheo_offload.calibration.data import cut, read_texts
    from rheo_offload.calibration.fit import FitOptions
    from rheo_offload.calibration.run import CalibrationOptions, calibrate, check_out, save

    check_out(args.out)
    text = read_texts(args.data)
    if not text.strip():
        raise CalibrationError(f"there is no text in {', '.join(args.data)}")
    options = CalibrationOptions(
        kind=args.kind,
        target=args.target,
        block_size=args.block_size,
        token_budget=args.budget or args.context // 4,
        queries=args.queries,
        score_steps=args.score_steps,
        fit=FitOptions(steps=args.steps, lr=args.lr, seed=args.seed),
        shares=(0.25, 0.5, 0.75),
    )
    options.check(args.context)
    model, tokenizer = load(args.model, gguf=args.gguf, dtype=args.dtype, device=args.device)
    windows = cut(text, tokenizer, context=args.context, most=args.windows)
    found = calibrate(model, windows, options, progress=progress_bar)
    source = f"{', '.join(Path(f).name for f in args.data)}, {windows.tokens} tokens, context {args.context}"
    save(args.out, model, found, options, source)
    _report(args, windows.tokens, found, options)
    return 0


def _report(args: argparse.Namespace, tokens: int, found: Any, options: Any) -> None:
    """Print losses and score as tables, or as one JSON record."""
    rows = found.scores(options)
    losses = {
        f"{kind}.{i}": [fitted.before, fitted.after, fitted.steps]
        for kind, heads in (("eviction", found.eviction), ("gate", found.gate))
        for i, fitted in heads.items()
    }
    if args.json:
        score = [
            {"query": q, "agnostic": a, "share": share, "recall": s.recall, "hit_rate": s.hit_rate}
            for q, a, share, s in rows
        ]
        print(json.dumps({"out": args.out, "tokens": tokens, "losses": losses, "score": score}))
        return
    print(f"loss on held-out text, before and after (steps), of {tokens} tokens in all")
    for name, (before, after, steps) in losses.items():
        print(f"  {name:<14} {before:.4f} {after:.4f} ({steps})")
    budget = options.budget
    print(
        f"\n{args.score_steps} steps of the last window, {budget.blocks} blocks of {args.block_size} a step"
    )
    hits = f"hits at {budget.capacity_ratio}x"
    print(f"{'for the query':<14} {'whatever the query':<19} {'share':>5} {'recall':>7} {hits:>12}")
    for query, agnostic, share, mean in rows:
        print(f"{query:<14} {agnostic:<19} {share:>5.2f} {mean.recall:>7.3f} {mean.hit_rate:>12.3f}")
    print(f"\nwritten: {args.out}")


@contextmanager
def progress_bar(what: str, count: int) -> Iterator[Callable[[str], None]]:
    """Show one stage on stderr."""
    with tqdm(total=count, desc=what, unit="layer") as bar:

        def tick(note: str) -> None:
            if note:
                bar.set_postfix_str(note)
            bar.update()

        yield tick
