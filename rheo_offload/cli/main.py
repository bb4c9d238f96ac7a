"""The `rheo` command: one verb a file, each with `add_parser(subparsers)`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rheo_offload import __version__
from rheo_offload.cli import calibrate, demo, doctor, eval, generate, plan, trace
from rheo_offload.errors import RheoError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
VERBS = (calibrate, demo, doctor, eval, generate, plan, trace)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb; parsed arguments carry `run`, a function from them to an exit code."""
    parser = argparse.ArgumentParser(
        prog="rheo",
        description="Decode long contexts with the KV cache in host memory and sparse attention on the GPU.",
    )
    parser.add_argument("--version", action="version", version=f"rheo {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(verbs)
    for verb_parser in verbs.choices.values():
        verb_parser.add_argument(
            "-v", "--verbose", action="store_true", help="log what was decided, on stderr"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, 2 after an error this package explains, 130 after Ctrl-C."""
    args = parse(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except RheoError as error:
        print(f"rheo: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("rheo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left. Without this the interpreter complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; `group.key=value` may stand anywhere after the verb."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") or "=" not in text]
    if strange or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        args.overrides += rest
    return args
