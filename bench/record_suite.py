"""`python -m bench record`: read the texts, decode each under every policy, write one recording a policy."""

import argparse
import hashlib
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bench.env import environment
from bench.record import Recorder
from bench.recorded import FORMAT, Recording
from bench.schema import Environment
from bench.texts import TEXTS
from rheo_offload.model.loader import PACKAGED_MODEL, load
from rheo_offload.selection.mean_key import MeanKey
from rheo_offload.selection.policy import make_policy
from rheo_offload.types import Policy

POLICIES = {
    f"s{blocks}-{heat}": (blocks, share)
    for blocks in (64, 32)
    for heat, share in (("heat", 0.5), ("noheat", 0.0))
}
"""File name -> (block budget, query-agnostic share)."""
HEAT_DECAY = 0.98
BLOCK_SIZE = 64
TRACES = Path(__file__).parent / "traces"


def policy_of(name: str) -> Policy:
    """Return the policy of a recording, split as the runtime does by default."""
    blocks, share = POLICIES[name]
    return make_policy(
        selector=MeanKey(),
        block_budget=blocks,
        sink_blocks=1,
        recent_blocks=blocks // 4,
        query_agnostic_share=share,
        heat_decay=HEAT_DECAY,
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> torch.Tensor:
    """Return the first `count` tokens, [1, count], BOS included.

    Raises:
        ValueError: the text is shorter.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    if len(ids) < count:
        raise ValueError(f"the text has {len(ids)} tokens, {count} are needed")
    return torch.tensor([ids[:count]])


def record(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_name: str,
    texts: Sequence[str],
    policies: Sequence[str],
    prompt_tokens: int,
    steps: int,
    block_size: int,
    environment: Environment,
    folder: Path,
    scores_folder: Path | None,
) -> list[Path]:
    """Record every policy on every text.

    Args:
        model, tokenizer: not offloaded, fp32, CPU.
        model_name: for the file names and the record.
        texts: keys of TEXTS.
        policies: keys of POLICIES.
        prompt_tokens: read densely before the first step; whole blocks.
        steps: decode steps to record.
        block_size: tokens in a block.
        environment: kept in the file.
        folder: where the recordings go.
        scores_folder: where the scores that `bench prefetch` needs go (large); None: they are dropped.

    Returns:
        The recordings written.
    """
    recorder = Recorder(model, block_size=block_size, max_blocks=-(-(prompt_tokens + steps) // block_size))
    common: dict[str, Any] = {
        "format": FORMAT,
        "model": model_name,
        "python": platform.python_version(),
        "method": "mean_key",
        "continuation": "teacher-forced: the text's own",
        "start_tokens": prompt_tokens,
        "block_size": block_size,
        "streams": [],
        "token_sha256": {},
        "environment": asdict(environment),
    }
    arrays: dict[str, dict[str, list[Any]]] = {name: defaultdict(list) for name in policies}
    written: list[Path] = []
    for text in texts:
        ids = token_ids(tokenizer, TEXTS[text](), prompt_tokens + steps)
        common["token_sha256"][text] = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        began = time.monotonic()
        prefix = recorder.read(ids[:, :prompt_tokens])
        print(f"{text}: read in {time.monotonic() - began:.0f} s", flush=True)
        common["streams"] += [[text, i, h] for i, s in prefix.layers.items() for h in range(s.heat.shape[1])]
        for name in policies:
            made = recorder.decode(prefix, policy_of(name), ids[:, prompt_tokens:])
            for layer in made.values():
                for key, value in layer.items():
                    arrays[name][key] += list(value)
            print(f"{text}: {name} after {time.monotonic() - began:.0f} s", flush=True)
        # After every text, so that an aborted run keeps what it has.
        written = [
            _write(f"{model_name}-{name}", found, common | asdict(policy_of(name)), folder, scores_folder)
            for name, found in arrays.items()
        ]
    return written


def _write(
    name: str, arrays: dict[str, list[Any]], meta: dict[str, Any], folder: Path, scores_folder: Path | None
) -> Path:
    """Write one recording, and beside it what only the replay of prefetch policies needs."""
    found = {key: np.stack(value) for key, value in arrays.items()}
    prompt_blocks = meta["start_tokens"] // meta["block_size"]
    order = np.argsort(-found["start_heat"], axis=1, kind="stable")[:, :prompt_blocks]
    recording = Recording(
        base=found.pop("selected"), early=found.pop("early"), start_order=order.astype(np.uint16), meta=meta
    )
    path = folder / f"{name}.npz"
    recording.save(path)
    if scores_folder is not None:
        np.savez(scores_folder / f"{name}.scores.npz", **found)  # type: ignore[arg-type]
    return path


def add_parser(suites: Any, common: argparse.ArgumentParser) -> None:
    """Add the `record` suite."""
    parser = suites.add_parser(
        "record", parents=[common], help="which blocks a real model selects, step by step"
    )
    parser.add_argument("--model", default=PACKAGED_MODEL, help="directory or hub id (default: %(default)s)")
    parser.add_argument("--texts", default=",".join(TEXTS), metavar="T,...", help="default: %(default)s")
    parser.add_argument(
        "--policies", default=",".join(POLICIES), metavar="P,...", help="default: %(default)s"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=16000, help="whole blocks (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=384, help="default: %(default)s")
    parser.add_argument(
        "--scores", type=Path, help="folder for the scores that `bench prefetch` needs (large)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the suite; `--out` defaults to bench/traces."""
    texts, policies = args.texts.split(","), args.policies.split(",")
    unknown = sorted({*texts} - {*TEXTS} | {*policies} - {*POLICIES})
    if unknown:
        raise ValueError(f"unknown texts or policies: {', '.join(unknown)}")
    model, tokenizer = load(args.model, dtype="float32", device="cpu")
    folder = args.out or TRACES
    for path in filter(None, (folder, args.scores)):
        path.mkdir(parents=True, exist_ok=True)
    written = record(
        model,
        tokenizer,
        model_name=Path(args.model).name,
        texts=texts,
        policies=policies,
        prompt_tokens=args.prompt_tokens,
        steps=args.steps,
        block_size=BLOCK_SIZE,
        environment=environment(torch.device("cpu"), argv, args.commit),
        folder=folder,
        scores_folder=args.scores,
    )
    for path in written:
        print(path)
    return 0
