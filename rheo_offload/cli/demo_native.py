"""The demo on `native`, the small model that comes with this package: many questions about one long context."""

import argparse
import sys
import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from rheo_offload.cli.demo import nothing_moved
from rheo_offload.cli.options import config_from
from rheo_offload.config import RheoConfig
from rheo_offload.errors import RheoError
from rheo_offload.eval.recall import VOCABULARY, Layout, ask, draw_sequence
from rheo_offload.model.loader import load
from rheo_offload.model.offload import offload
from rheo_offload.model.specs import max_positions

BUDGET_TOKENS = 512
CONTEXT_TOKENS = {False: 8192, True: 2048}
QUESTION_TOKENS = 160
"""Room for questions and answers at the end of the context: some thirty of them."""
SEED = 4_000_000
"""Of no training step, and of no evaluation."""
ENOUGH = 0.95


def native_config(args: argparse.Namespace) -> tuple[int, RheoConfig]:
    """Return the context's length and the configuration: the model's own, with a pool that blocks leave again."""
    small = [
        f"selection.token_budget={args.budget or BUDGET_TOKENS}",
        "cache.device_memory=floor",
        "audit.every=8",
    ]
    chosen = argparse.Namespace(model=args.model, config=args.config, overrides=[*small, *args.overrides])
    return args.context or CONTEXT_TOKENS[args.short], config_from(chosen)


def run_native(args: argparse.Namespace) -> int:
    """Ask the questions; return 0, or 1 when fewer than 95 % of the answers are right or no block moved."""
    for name in ("depth", "max_new_tokens"):
        if getattr(args, name) is not None:
            raise RheoError(
                f"--{name.replace('_', '-')} has no effect on {args.model}: it answers many questions, about records "
                "anywhere in the context, and a question says how long its answer is"
            )
    context, config = native_config(args)
    # float32 on a GPU too: that is what its recall is tested in, and weights of this size cost nothing
    dtype = "float32" if args.dtype == "auto" else args.dtype
    model, _ = load(args.model, gguf=args.gguf, dtype=dtype, device=args.device)
    positions = max_positions(model.config)
    if positions is not None and context > positions:
        raise RheoError(f"--context {context} exceeds the model's {positions} positions")
    layout, ids = draw_sequence(context, min(QUESTION_TOKENS, context // 3), SEED)
    offload(model, config)
    asked = len(layout.questions)
    print(
        f"{args.model} on {model.device}, {dtype}: {layout.context_tokens:,} tokens of context, and {asked} questions "
        f"about it,\nnone of them seen in training. Each step attends to at most {config.selection.token_budget:,} "
        "tokens per KV head. The model answers:\n"
    )
    begin = time.perf_counter()
    right, new_tokens = answer_all(model, ids, layout)
    seconds = time.perf_counter() - begin
    # The clock of a run is that of one turn, and these are many.
    times = dict.fromkeys(("ttft_ms", "itl_p50_ms", "itl_p95_ms", "decode_tps"))
    given = layout.context_tokens + 2 * asked
    stats = replace(model.rheo.stats(), prompt_tokens=given, new_tokens=new_tokens, **times)
    print(f"\n{right} of {asked} answers are right; all of it took {seconds:.1f} s.\n\n{stats.table()}\n")
    few = [f"{right} of {asked} answers are right, fewer than {ENOUGH:.0%}"] if right < ENOUGH * asked else []
    problems = few + nothing_moved(stats)
    for problem in problems:
        print(f"rheo demo: {problem}", file=sys.stderr)
    if not problems:
        print("Blocks were evicted and loaded again on the way.")
    return 1 if problems else 0


def answer_all(model: Any, ids: Tensor, layout: Layout) -> tuple[int, int]:
    """Print the questions of ids [1, num_tokens] with their answers; return how many are right, and their tokens."""
    right = new_tokens = 0
    for question, answer in ask(model, ids, layout):
        given = ids[0, question.start - 1 : question.start + 1].tolist()
        truth = ids[0, question.start + 1 : question.end + 1].tolist()
        verdict = "right" if answer == truth else f"wrong: it is {spelled(truth)}"
        print(f"  {spelled(given)} -> {spelled(answer)}  {verdict}", flush=True)
        right += answer == truth
        new_tokens += len(answer)
    return right, new_tokens


def spelled(tokens: list[int]) -> str:
    """Return the words of token ids."""
    return " ".join(VOCABULARY[token] for token in tokens)
