"""The needle test: a fact planted in a long real text, and a prompt that ends where the model must repeat it.

A base model does not answer questions about a long text, but it continues a sentence it has read. The
question must go through the decode path: a dense prefill would carry the answer past the selection.

    python -m rheo_offload.eval.needle --contexts 8192,16384 --out out/needle
"""

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rheo_offload.config import RheoConfig
from rheo_offload.errors import RheoError
from rheo_offload.eval.texts import prose_paragraphs
from rheo_offload.metrics.probe import device_facts, versions
from rheo_offload.model.loader import PACKAGED_MODEL, load
from rheo_offload.model.offload import offload, restore
from rheo_offload.selection.policy import METHODS as SELECTORS

__all__ = [
    "NeedlePrompt",
    "NeedleRow",
    "dense_tokens",
    "evaluate",
    "method_config",
    "needle_prompt",
    "rheo_tokens",
]

FACT = "The access code of vault {vault} is"
VAULT, CODE = "Zephyr-9", "84894"


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedlePrompt:
    """A prompt and what a correct continuation begins with.

    Attributes:
        ids: [1, num_tokens] int64.
        answer: the planted code.
        question_tokens: the last tokens of `ids`, which must be decoded one by one.
    """

    ids: Tensor
    answer: str
    question_tokens: int

    def found(self, continuation: str) -> bool:
        """Say whether the text the model went on with begins with the code."""
        return continuation.strip().startswith(self.answer)


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, depth: float, *, vault: str = VAULT, code: str = CODE
) -> NeedlePrompt:
    """Plant a code between two paragraphs of a long text and end with the question for it.

    Args:
        tokenizer: of the model under test.
        num_tokens: length of the prompt, BOS and question included.
        depth: where the fact stands, 0 = at the beginning, 1 = before the question.
        vault: a name that occurs nowhere else in the text.
        code: what must be found.

    Raises:
        RheoError: the text is shorter than num_tokens, or num_tokens leaves no room for the text.
        ValueError: depth is outside [0, 1].
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], not {depth}")

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    question = tokens(FACT.format(vault=vault))
    needle = tokens(f"{FACT.format(vault=vault)} {code}.\n\n")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    gap = tokens("\n\n")
    room = num_tokens - len(bos) - len(needle) - len(gap) - len(question)
    if room < 1:
        raise RheoError(f"a needle prompt of {num_tokens} tokens has no room for any text")
    text: list[int] = []
    plant = 0
    for paragraph in prose_paragraphs():
        if len(text) >= room:
            break
        if len(text) <= depth * room:
            plant = len(text)
        text += tokens(f"{paragraph}\n\n")
    if len(text) < room:
        raise RheoError(f"the text has {len(text)} tokens, too few for a prompt of {num_tokens}")
    ids = [*bos, *text[:plant], *needle, *text[plant:room], *gap, *question]
    return NeedlePrompt(ids=torch.tensor([ids]), answer=code, question_tokens=len(question))


@torch.no_grad()
def dense_tokens(
    model: PreTrainedModel, ids: Tensor, *, max_new_tokens: int, chunk_tokens: int = 1024
) -> list[int]:
    """Greedy tokens of the stock model with its own cache; the prompt goes in chunk by chunk to bound memory.

    Args:
        model: not offloaded.
        ids: [1, num_tokens] int64.
        max_new_tokens: tokens to make; end-of-sequence does not stop.
        chunk_tokens: prompt tokens per forward.
    """
    ids = ids.to(model.device)
    cache = DynamicCache(config=model.config)
    for chunk in ids.split(chunk_tokens, dim=1):
        logits = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    made: list[int] = []
    for _ in range(max_new_tokens):
        made.append(int(logits[0, -1].argmax()))
        if len(made) < max_new_tokens:
            step = torch.tensor([[made[-1]]], device=model.device)
            logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return made


def rheo_tokens(model: PreTrainedModel, prompt: NeedlePrompt, *, max_new_tokens: int) -> list[int]:
    """Greedy tokens of an offloaded model; the question goes through the decode path."""
    ids = prompt.ids.to(model.device)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        decode_tail_tokens=prompt.question_tokens,
    )
    return made[0, ids.shape[1] :].tolist()


DENSE = "dense"
# The packaged configuration of each method that selects; the budget and the pool are made equal.
CONFIG_OF = {name: "default" if name == "mean_key" else name for name in SELECTORS if name != "full"}
METHODS = (DENSE, *CONFIG_OF)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleRow:
    """One prompt answered by one method. What only an offloaded model has is None for `dense`."""

    model: str
    dtype: str
    device: str
    method: str
    context_len_tokens: int
    depth: float
    token_budget: int | None
    found: bool
    continuation: str
    hit_rate: float | None = None
    hit_rate_unforced: float | None = None
    captured_mass_mean: float | None = None
    captured_mass_min: float | None = None
    selected_blocks: int | None = None
    miss_blocks: int | None = None
    evicted_blocks: int | None = None
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    prefill_h2d_bytes: int | None = None
    warm_h2d_bytes: int | None = None
    device_kv_bytes: int | None = None
    dense_kv_bytes: int | None = None


STATS_FIELDS = tuple(f.name for f in fields(NeedleRow) if f.default is None)


def method_config(method: str, token_budget: int, overrides: Sequence[str] = ()) -> RheoConfig:
    """Return a method's packaged configuration with this budget and a pool of 1.5 budgets, audited often."""
    equal = [
        f"selection.token_budget={token_budget}",
        "selection.recent_blocks=auto",
        "cache.capacity_ratio=1.5",
        "cache.device_memory=floor",
        "audit.every=4",
    ]
    return RheoConfig.from_yaml(CONFIG_OF[method]).with_overrides([*equal, *overrides])


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    contexts: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    methods: Sequence[str] = METHODS,
    token_budget: int = 2048,
    overrides: Sequence[str] = (),
) -> Iterator[NeedleRow]:
    """Ask every method for the code at every context length and depth; rows come as they are done.

    Args:
        model: not offloaded; it is offloaded for each method in turn and restored.
        tokenizer: of the model.
        name: of the model, for the rows.
        contexts: prompt lengths in tokens.
        depths: places of the fact, 0..1.
        methods: `dense` (the stock model) or a key of CONFIG_OF.
        token_budget: tokens attended per KV head and step.
        overrides: `group.key=value`, applied last.
    """
    prompts = [(n, depth, needle_prompt(tokenizer, n, depth)) for n in contexts for depth in depths]
    new_tokens = len(tokenizer(CODE, add_special_tokens=False)["input_ids"]) + 3
    common: dict[str, Any] = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": "cpu" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device),
    }
    for method in methods:
        config = None if method == DENSE else method_config(method, token_budget, overrides)
        if config is not None:
            offload(model, config)
        try:
            for n, depth, prompt in prompts:
                if config is None:
                    made, measured = dense_tokens(model, prompt.ids, max_new_tokens=new_tokens), {}
                else:
                    made, stats = rheo_tokens(model, prompt, max_new_tokens=new_tokens), model.rheo.stats()
                    measured = {field: getattr(stats, field) for field in STATS_FIELDS}
                text = tokenizer.decode(made)
                yield NeedleRow(
                    **common,
                    method=method,
                    context_len_tokens=n,
                    depth=depth,
                    token_budget=None if config is None else token_budget,
                    found=prompt.found(text),
                    continuation=text,
                    **measured,
                )
        finally:
            restore(model)


def _line(row: NeedleRow) -> str:
    text = (
        f"{row.method:<10} {row.context_len_tokens:>6} {row.depth:>5} {'found' if row.found else 'MISSED':<7}"
    )
    if row.hit_rate is not None and row.h2d_bytes is not None:
        mass = "-" if row.captured_mass_mean is None else f"{row.captured_mass_mean:.3f}"
        text += f" hit {row.hit_rate:.3f}  mass {mass}  misses {row.h2d_bytes / MIB:.1f} MiB"
    return f"{text}  {row.continuation!r}"


def _list_of(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rheo_offload.eval.needle", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default=PACKAGED_MODEL, help="directory or hub id (default: %(default)s)")
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file inside that directory")
    parser.add_argument("--contexts", type=_list_of(int), default=[8192, 16384], metavar="N,N", help="tokens")
    parser.add_argument("--depths", type=_list_of(float), default=list(DEPTHS), metavar="X,X", help="0..1")
    parser.add_argument(
        "--methods", type=_list_of(str), default=list(METHODS), metavar="M,M", help=", ".join(METHODS)
    )
    parser.add_argument(
        "--budget", type=int, default=2048, help="tokens per KV head and step (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="directory for rows.csv and env.json")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value", help="configuration overrides")
    args = parser.parse_intermixed_args(argv)
    unknown = sorted(set(args.methods) - set(METHODS))
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; known: {', '.join(METHODS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation from the command line; return 0, or 2 after an error this package explains."""
    args = _arguments(argv)
    try:
        configs = {
            m: method_config(m, args.budget, args.overrides).to_dict() for m in args.methods if m != DENSE
        }
        model, tokenizer = load(args.model, gguf=args.gguf, dtype=args.dtype, device=args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        env = {
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(
                ["python", "-m", "rheo_offload.eval.needle", *(sys.argv[1:] if argv is None else argv)]
            ),
            "versions": versions(),
            "device": device_facts(model.device),
            "configs": configs,
        }
        (args.out / "env.json").write_text(json.dumps(env, indent=2) + "\n", encoding="utf-8")
        with (args.out / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(NeedleRow)])
            writer.writeheader()
            rows = evaluate(
                model,
                tokenizer,
                name=args.model,
                contexts=args.contexts,
                depths=args.depths,
                methods=args.methods,
                token_budget=args.budget,
                overrides=args.overrides,
            )
            for row in rows:
                writer.writerow(asdict(row))
                file.flush()
                sys.stdout.write(_line(row) + "\n")
                sys.stdout.flush()
    except RheoError as error:
        sys.stderr.write(f"needle: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
