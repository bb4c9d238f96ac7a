"""`python -m bench locality`: recall, hits and bytes of every setting of locality, on several kinds of text.

A model that brings its own `nosa` configuration (`native`) is captured with its learned bias, and replayed twice: with
mean keys and the default split, and with its own ranking and split, where its bias is one more rank beside the heats.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.locality import Grid, Heat, Result, replay_text
from bench.locality_recall import RECALL_TEXTS, recall_ids
from bench.locality_streams import MEAN_KEY, Ranking
from bench.record_suite import token_ids
from bench.schema import Row
from bench.texts import TEXTS
from csrc_free_kernels.reference.token_bias import token_bias
from rheo_offload import RheoConfig
from rheo_offload.calibration.capture import Sample, capture
from rheo_offload.calibration.run import check_model
from rheo_offload.calibration.score import WARM_QUERIES
from rheo_offload.eval.recall import VOCABULARY
from rheo_offload.model.learned_heads import attach_heads, load_heads
from rheo_offload.model.loader import NATIVE_MODEL, PACKAGED_MODEL, load, own_config
from rheo_offload.model.specs import layer_specs, text_config
from rheo_offload.selection.nosa import NOSA
from rheo_offload.selection.policy import make_selector

__all__ = [
    "HIT_RATE",
    "RECALL_KEPT",
    "add_parser",
    "attach_own_heads",
    "capture_text",
    "rows_of",
    "run_locality",
    "settings_of",
]

HIT_RATE = 0.98
"""What a setting should reach ..."""
RECALL_KEPT = 0.99
"""... with this much of the recall that the same budget has without a query-agnostic share."""
DEFAULT_TEXTS = ("prose-reference", "code-modules", "json-log")
QUICK = {"prompt_tokens": 1024, "steps": 64, "skip": 16, "token_budgets": [512], "texts": ["prose-reference"]}


def capture_text(
    model: PreTrainedModel, ids: Tensor, *, prompt_tokens: int, block_size: int
) -> dict[int, Sample]:
    """Run ids [S] through a model once; returns per full-attention layer what a replay of the last S - P needs.

    Raises:
        CalibrationError: with every reason why this model cannot be looked at.
    """
    layers = [spec.layer_idx for spec in check_model(model, len(ids))]
    positions = torch.arange(prompt_tokens - WARM_QUERIES, len(ids))
    return capture(model, ids, positions, block_size=block_size, layers=layers)


def rows_of(results: Sequence[Result], *, method: str = MEAN_KEY.method, **common: Any) -> Iterator[Row]:
    """Return a row per setting of one text; the target is judged against the share 0 of the same budget.

    Args:
        results: of one text and ranking, share 0 among them.
        method: how the query ranked blocks.
        common: fields that all rows share; `fill` names the text.
    """
    plain = {(r.block_size, r.blocks): r.recall for r in results if not r.share}
    own = "" if method == MEAN_KEY.method else f"-{method}"
    for r in results:
        met = r.hit_rate >= HIT_RATE and r.recall >= RECALL_KEPT * plain[r.block_size, r.blocks]
        source = r.heat.source if r.heat else "none"
        decay = f"{r.heat.decay:g}" if r.heat and source != "bias" else ""
        pointed = "" if r.pointed is None else f"{r.pointed:.6g}"
        name = "-".join(["", source, *filter(None, [decay])]) if r.heat else ""
        yield Row(
            suite="locality",
            case_id=f"{common['fill']}{own}-b{r.block_size}-n{r.blocks}-share{r.share:g}{name}-c{r.capacity:g}",
            metric="hit_rate",
            unit="fraction",
            p50=r.hit_rate,
            bytes_moved=r.bytes,
            batch=1,
            block_size=r.block_size,
            token_budget=r.blocks * r.block_size,
            method=method,
            hit_rate=r.hit_rate,
            hit_rate_unforced=r.hit_rate_unforced,
            missed_blocks=r.misses,
            captured_mass=r.recall,
            target=HIT_RATE,
            target_met=str(met).lower(),
            note=f"share={r.share:g} heat={source} decay={decay} capacity={r.capacity:g} pointed={pointed}",
            **common,
        )


def run_locality(
    args: argparse.Namespace, device: torch.device, extend: Callable[[Sequence[Row]], None]
) -> None:
    """Capture every text and replay the grid on it; rows are handed over text by text."""
    model, tokenizer = load(args.model, dtype=args.dtype, device=str(device))
    grids = [_grid(args)]
    config = own_config(args.model)
    if config is not None and config.selection.method == NOSA.name:
        grids.append(_own_grid(grids[0], config, attach_own_heads(model, config)))
    finest = min(*args.block_sizes, *(grid.ranking.stride or args.block_sizes[0] for grid in grids))
    for text in args.texts:
        began = time.monotonic()
        ids = _ids_of(text, tokenizer, args.prompt_tokens, args.steps)
        samples = capture_text(model, ids, prompt_tokens=args.prompt_tokens, block_size=finest)
        captured = time.monotonic()
        streams = sum(sample.mass.shape[1] for sample in samples.values())
        settings = 0
        for grid in grids:
            results = list(replay_text(samples, grid, itemsize=model.dtype.itemsize))
            settings += len(results)
            extend(
                list(
                    rows_of(
                        results,
                        method=grid.ranking.method,
                        fill=text,
                        model=Path(args.model).name,
                        dtype=str(model.dtype).removeprefix("torch."),
                        context_len_tokens=len(ids),
                        n=streams * (args.steps - args.skip),
                    )
                )
            )
        print(
            f"{text}: {settings} settings of {streams} streams; captured in {captured - began:.0f} s, "
            f"replayed in {time.monotonic() - captured:.0f} s",
            flush=True,
        )


def _grid(args: argparse.Namespace) -> Grid:
    heats = [Heat(source, decay) for source in ("scores", "attention") for decay in args.decays]
    return Grid(
        block_sizes=args.block_sizes, token_budgets=args.token_budgets, shares=sorted({0.0, *args.shares}), heats=heats,
        capacities=args.capacities, skip=args.skip,
    )  # fmt: skip


def attach_own_heads(model: PreTrainedModel, config: RheoConfig) -> NOSA:
    """Give a model the learned bias of its own configuration, as `offload` does; returns the method."""
    selection = config.selection
    method = make_selector(selection.method, selection.params, block_size=config.cache.block_size)
    assert isinstance(method, NOSA)
    kind = text_config(model.config).model_type
    heads = load_heads(method.weights, model, layer_specs(model.config), model_type=kind)
    attach_heads(model, heads, method, token_bias)
    return method


def _own_grid(grid: Grid, config: RheoConfig, method: NOSA) -> Grid:
    """Return a grid over the same settings with the ranking, the split and the share of a model's own configuration."""
    recent = config.selection.recent_blocks
    return replace(
        grid,
        ranking=Ranking(method="infllm_v2", stride=method.window_stride),
        recent_blocks=None if recent == "auto" else int(recent),
        shares=list(dict.fromkeys([0.0, config.selection.query_agnostic_share, *grid.shares])),
        heats=[*grid.heats, Heat("bias")],
    )


def _ids_of(text: str, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, steps: int) -> Tensor:
    """Return the tokens [S] of a text.

    Raises:
        ValueError: it is too short, or one of recall for a model with other words.
    """
    if text not in RECALL_TEXTS:
        return token_ids(tokenizer, TEXTS[text](), prompt_tokens + steps)[0]
    if len(tokenizer) != len(VOCABULARY):
        raise ValueError(f"{text} is in the words of the model {NATIVE_MODEL}")
    return recall_ids(text, prompt_tokens, steps)


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """Return what is asked for, for the record; `--quick` makes it small.

    Raises:
        ValueError: it makes no sense.
    """
    if args.quick:
        vars(args).update(QUICK)
    known = [*TEXTS, *RECALL_TEXTS]
    if unknown := sorted({*args.texts} - {*known}):
        raise ValueError(f"unknown texts: {', '.join(unknown)}; known: {', '.join(known)}")
    if not 0 <= args.skip < args.steps:
        raise ValueError(f"--skip {args.skip} leaves nothing of --steps {args.steps}")
    if min(args.token_budgets) < 4 * max(args.block_sizes):
        raise ValueError("--token-budgets must be at least 4 blocks of every size")
    if not all(0 <= x <= 1 for x in (*args.shares, *args.decays)):
        raise ValueError("--shares and --decays must be between 0 and 1")
    if min(args.capacities) < 1:
        raise ValueError("--capacities must be at least 1.0: a pool holds what a step selects")
    if any(size % min(args.block_sizes) for size in args.block_sizes):
        raise ValueError("--block-sizes must be multiples of the smallest")
    whole = max(args.block_sizes)
    if args.prompt_tokens < WARM_QUERIES or args.prompt_tokens % whole or args.steps % whole:
        raise ValueError(
            f"--prompt-tokens and --steps must be whole blocks of {whole} tokens, the prompt at least {WARM_QUERIES}"
        )
    return {key: value for key, value in vars(args).items() if key not in ("run", "out", "commit", "device")}


def add_parser(suites: Any, common: argparse.ArgumentParser, run: Callable[..., int]) -> None:
    """Add the `locality` suite."""
    grid = Grid()
    parser = suites.add_parser(
        "locality", parents=[common], help="recall, hits and bytes over share, decay, heat and capacity"
    )
    parser.add_argument("--model", default=PACKAGED_MODEL, help="directory or hub id (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=8192, help="whole blocks (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=192, help="of the text itself, after the prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--skip", type=int, default=grid.skip, help="first steps left out (default: %(default)s)"
    )
    for name, kind, default, unit in (
        ("texts", str, DEFAULT_TEXTS, "TEXT"),
        ("block-sizes", int, grid.block_sizes, "TOKENS"),
        ("token-budgets", int, grid.token_budgets, "TOKENS"),
        ("shares", float, grid.shares, "SHARE"),
        ("decays", float, (0.9, 0.98, 1.0), "FACTOR"),
        ("capacities", float, grid.capacities, "RATIO"),
    ):
        shown = ",".join(map(str, default))
        parser.add_argument(
            f"--{name}",
            type=_list_of(kind),
            default=list(default),
            metavar=f"{unit},...",
            help=f"default: {shown}"
            + (f"; also {', '.join(RECALL_TEXTS)}, for {NATIVE_MODEL}" * (kind is str)),
        )
    parser.set_defaults(run=run)


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        found = [kind(item) for item in text.split(",") if item]
        if not found:
            raise argparse.ArgumentTypeError("at least one is needed")
        return found

    return parse
