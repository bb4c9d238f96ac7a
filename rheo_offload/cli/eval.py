"""`rheo eval`: what sparse decoding costs in quality, tasks x methods x budgets, beside the dense model."""

import argparse
import hashlib
import json
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rheo_offload.cli.generate import read_text
from rheo_offload.cli.options import at_least
from rheo_offload.cli.plan import load_config
from rheo_offload.config import RheoConfig
from rheo_offload.errors import RheoError
from rheo_offload.metrics.probe import versions
from rheo_offload.model.loader import (
    PACKAGED_MODEL,
    load,
    load_tokenizer,
    model_folder,
    own_config,
    resolve_device,
    resolve_dtype,
)
from rheo_offload.model.specs import max_positions

# rheo_offload.eval is imported where it is used: other verbs need not wait for it.

TASKS = "needle,ruler,json,long_generation,perplexity,kl"


def add_parser(subparsers: Any) -> None:
    """Add the `eval` verb."""
    parser = subparsers.add_parser(
        "eval", help="quality of every method and budget beside the dense model", description=__doc__
    )
    parser.add_argument("--model", default=PACKAGED_MODEL, help="directory or hub id (default: %(default)s)")
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file inside that directory")
    parser.add_argument(
        "--tasks", type=names, metavar="T,...",
        help=f"default: {TASKS}; for a model whose vocabulary is that of synthetic recall: recall",
    )  # fmt: skip
    parser.add_argument(
        "--methods", type=names, default=["mean_key"], metavar="M,...",
        help="selection methods, packaged configurations or YAML files, also as LABEL=METHOD (default: mean_key)",
    )  # fmt: skip
    parser.add_argument(
        "--budgets",
        type=numbers,
        default=[1024],
        metavar="N,...",
        help="tokens per KV head and step (default: 1024)",
    )
    parser.add_argument(
        "--contexts", type=numbers, default=[4096], metavar="N,...", help="prompt tokens (default: 4096)"
    )
    parser.add_argument(
        "--depths", type=depths, default=depths("0.1,0.3,0.5,0.7,0.9"), metavar="X,...",
        help="where a fact stands, 0 to 1 (default: 0.1,0.3,0.5,0.7,0.9)",
    )  # fmt: skip
    parser.add_argument(
        "--keys",
        type=key_counts,
        default=[1, 4],
        metavar="N,...",
        help="vaults whose codes a needle prompt names (default: 1,4)",
    )
    parser.add_argument(
        "--samples", type=at_least(1), default=1, metavar="N", help="cases of each kind (default: 1)"
    )
    parser.add_argument(
        "--scored-tokens", type=at_least(1), default=256, metavar="N",
        help="tokens that perplexity and kl force through the decode path (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--long-tokens",
        type=at_least(1),
        default=8192,
        metavar="N",
        help="of long_generation (default: 8192)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of names, numbers and places (default: 0)")
    parser.add_argument(
        "--text", metavar="FILE", help="text to fill prompts with (default: Python's language reference)"
    )
    parser.add_argument(
        "--no-dense-question",
        action="store_true",
        help="do not ask again with the question in the dense prefill",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="rows.jsonl, table.md and figures"
    )
    parser.add_argument(
        "--table", action="store_true", help="print methods x budgets over all tasks, nothing else"
    )
    parser.add_argument("--plots", action="store_true", help="draw figures, too (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON record instead of the tables")
    parser.add_argument(
        "overrides", nargs="*", metavar="[METHOD:]group.key=value",
        help="configuration overrides for all methods, or for one of them",
    )  # fmt: skip
    parser.set_defaults(run=run)


def names(text: str) -> list[str]:
    """Argparse type: names separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """Argparse type: positive integers separated by commas, each once."""
    return list(dict.fromkeys(at_least(1)(part) for part in text.split(",")))


def key_counts(text: str) -> list[int]:
    """Argparse type: numbers of vaults, as many as there are names for."""
    from rheo_offload.eval.needle import NAMES

    values = numbers(text)
    if max(values) > len(NAMES):
        raise argparse.ArgumentTypeError(f"there are names for {len(NAMES)} vaults, not {max(values)}")
    return values


def depths(text: str) -> tuple[float, ...]:
    """Argparse type: numbers from 0 to 1, separated by commas, each once."""
    values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"depths must be between 0 and 1, not {text}")
    return values


def run(args: argparse.Namespace) -> int:
    """Evaluate what the log does not have yet, write the report, and return 0."""
    from rheo_offload.eval.log import EvalLog
    from rheo_offload.eval.plots import figure_class, write_plots
    from rheo_offload.eval.report import markdown, method_table, row_line, task_tables
    from rheo_offload.eval.suite import Evaluation
    from rheo_offload.eval.task import Settings

    # Everything that can be refused without the weights is refused before they are loaded.
    tasks, setups = tasks_and_setups(args)
    evaluation = Evaluation(
        tasks=tasks,
        setups=setups,
        settings=Settings(
            contexts=tuple(args.contexts),
            depths=args.depths,
            keys=tuple(args.keys),
            samples=args.samples,
            scored_tokens=args.scored_tokens,
            long_tokens=args.long_tokens,
            seed=args.seed,
        ),
        dense_question=not args.no_dense_question,
    )
    if args.plots:
        figure_class()
    paragraphs = read_paragraphs(args.text)
    check_positions(args, evaluation)
    about = start_record(args, paragraphs, dense="stock" if setups[0].config is None else "with its bias")
    home = None if own_config(args.model) is None else Path(model_folder(args.model))
    configs = {(s.method, s.token_budget): logged(s.config, home) for s in setups if s.config is not None}
    log = EvalLog(args.out, run=about, configs=configs)
    missing = evaluation.missing(log)
    if missing:
        say(f"{len(missing)} of {len(missing) + len(evaluation.planned(log))} rows to do")
        evaluate(args, evaluation, paragraphs, log, len(missing), row_line)
    rows = evaluation.planned(log)
    summary = (
        {name: about[name] for name in ("command", "started_at")} | about["identity"] | about["versions"]
    )
    (args.out / "table.md").write_text(markdown(rows, about=summary), encoding="utf-8")
    if args.plots:
        write_plots(rows, args.out)
    if args.json:
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}))
    else:
        print(method_table(rows) if args.table else f"{method_table(rows)}\n\n{task_tables(rows)}")
    return 0


def tasks_and_setups(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return what is asked and of whom, checked against each other and the model's vocabulary.

    Raises:
        RheoError: an unknown name, a configuration that is refused, or a task that means nothing to the model.
    """
    from rheo_offload.eval.recall_task import speaks_recall
    from rheo_offload.eval.setups import setups_of
    from rheo_offload.eval.suite import check_tasks, tasks_of

    tasks = tasks_of(args.tasks if args.tasks is not None else names(TASKS))
    own = own_config(args.model)
    positions = None if own is None or args.gguf else max_positions(load_config(args.model))
    setups = setups_of(args.methods, args.budgets, args.overrides, own=own, positions=positions)
    if args.gguf:  # its vocabulary is known once it is loaded
        return tasks, setups
    recall = speaks_recall(load_tokenizer(args.model))
    if recall and args.tasks is None:
        tasks = tasks_of(["recall"])
    check_tasks(tasks, setups, recall=recall)
    return tasks, setups


def logged(config: RheoConfig, home: Path | None) -> dict[str, Any]:
    """Return a configuration for the log; files of a model's own directory `home` stand there by name."""
    values = config.to_dict()
    params = values["selection"]["params"]
    weights = params.get("weights")
    if weights is not None and home is not None and Path(weights).is_relative_to(home):
        params["weights"] = str(Path(weights).relative_to(home))
    return values


def evaluate(
    args: argparse.Namespace, evaluation: Any, paragraphs: Any, log: Any, total: int, line: Any
) -> None:
    """Load the model and do what is missing; a line per row on stderr, and a bar within a long one."""
    model, tokenizer = load(args.model, gguf=args.gguf, dtype=args.dtype, device=args.device)
    from rheo_offload.eval.suite import check_lengths

    check_lengths(
        evaluation.tasks, evaluation.settings, max_positions(model.config)
    )  # of a GGUF file: only now
    done = 0
    with tqdm(total=0, unit="tok", file=sys.stderr, leave=False, disable=None) as bar:

        def progress(tokens: int, of: int) -> None:
            bar.total = of
            bar.update(tokens - bar.n)

        def on_row(row: Any) -> None:
            nonlocal done
            done += 1
            bar.clear()
            say(f"[{done}/{total}] {line(row)}  {row.seconds:.1f} s")

        evaluation.run(model, tokenizer, paragraphs, log, on_row=on_row, progress=progress)


def say(text: str) -> None:
    """Write a line of progress."""
    print(text, file=sys.stderr, flush=True)


def read_paragraphs(file: str | None) -> tuple[str, ...]:
    """Return the paragraphs of a text file, or of Python's language reference.

    Raises:
        RheoError: the file cannot be read, or is empty.
    """
    if file is None:
        from rheo_offload.eval.texts import prose_paragraphs

        return prose_paragraphs()
    paragraphs = tuple(" ".join(p.split()) for p in read_text(file).split("\n\n") if p.strip())
    if not paragraphs:
        raise RheoError(f"the text {file!r} is empty")
    return paragraphs


def check_positions(args: argparse.Namespace, evaluation: Any) -> None:
    """Refuse contexts that the model was not made for; the configuration of a GGUF file is known once it is loaded."""
    from rheo_offload.eval.suite import check_lengths

    positions = None if args.gguf else max_positions(load_config(args.model))
    check_lengths(evaluation.tasks, evaluation.settings, positions)


def start_record(args: argparse.Namespace, paragraphs: tuple[str, ...], *, dense: str) -> dict[str, Any]:
    """Return what the log says about this start; `identity` is what rows of one log have in common.

    Args:
        args: of the command line.
        paragraphs: the text that prompts are filled with.
        dense: what the dense rows are made with; it changes when a model gets a `rheo.yaml` of its own.
    """
    device = resolve_device(args.device)
    config = {} if args.gguf else load_config(args.model).to_dict()
    kept = {
        key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")
    }
    return {
        "identity": {
            "model": args.model,
            "gguf": args.gguf,
            "model_config": digest(json.dumps(kept, sort_keys=True, default=str)),
            "dense": dense,
            "dtype": str(resolve_dtype(args.dtype, device)).removeprefix("torch."),
            "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
            "text": digest("\n".join(paragraphs)),
            "seed": args.seed,
            "dense_question": not args.no_dense_question,
        },
        "command": shlex.join(["rheo", *sys.argv[1:]]),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def digest(text: str) -> str:
    """Return twelve digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
