"""How far sparse decoding is from dense decoding, on a real text: the text's own continuation, token by token.

The stock model reads a prompt once and is fed what follows it; then every variant of a configuration gets the same
keys and values and the same tokens (teacher forcing, so that nobody drifts away). Reported per variant: the
Kullback-Leibler divergence of the next-token distribution from the dense one, how often both would choose the same
token, and what the audit measured at every step.

    python -m rheo_offload.eval.fidelity --out out/fidelity --budgets 8,16,32 \\
        --vary selection.remainder=none --vary selection.remainder=centroid cache.block_size=32
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

from rheo_offload.cache.group_bounds import complete_groups
from rheo_offload.config import RheoConfig
from rheo_offload.errors import RheoError
from rheo_offload.eval.texts import prose_paragraphs
from rheo_offload.metrics.probe import device_facts, versions
from rheo_offload.model.hf_cache import RheoCache
from rheo_offload.model.loader import PACKAGED_MODEL, load
from rheo_offload.model.offload import offload, restore
from rheo_offload.model.specs import max_positions

__all__ = ["Dense", "FidelityRow", "compare", "read_densely", "text_ids"]

CHUNK_TOKENS = 1024
OWN_TOKENS = 256  # of the prompt's end, which every variant reads itself, so that heat starts as always
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Dense:
    """What the stock model made of a text."""

    ids: Tensor
    """[1, P + T] int64."""
    prompt_tokens: int
    kv: list[tuple[Tensor, Tensor]]
    """Keys and values [1, Hkv, n, D] of every layer: the last n before the prompt's end that is read by all."""
    log_probs: Tensor
    """[T, V] fp32: the next-token distribution after each token behind the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityRow:
    """One variant at one budget, over all fed tokens."""

    model: str
    dtype: str
    device: str
    context_len_tokens: int
    steps: int
    variant: str
    block_size: int
    budget_blocks: int
    kl_mean: float
    """Nats per token, dense || sparse."""
    kl_p95: float
    same_token: float
    """Share of steps whose most likely token is the dense one."""
    nll: float
    """Nats per token of the text itself."""
    dense_nll: float
    output_error_mean: float | None
    captured_mass_mean: float | None
    hit_rate: float | None
    hit_rate_unforced: float | None
    miss_blocks: int
    h2d_bytes: int
    device_kv_bytes: int


def text_ids(tokenizer: PreTrainedTokenizerBase, num_tokens: int, text: str | None = None) -> Tensor:
    """Return the first `num_tokens` tokens of a text, by default Python's language reference, [1, num_tokens] int64.

    Raises:
        RheoError: the text is shorter.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for piece in [text] if text is not None else (f"{p}\n\n" for p in prose_paragraphs()):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= num_tokens:
            return torch.tensor([ids[:num_tokens]])
    raise RheoError(f"the text has {len(ids)} tokens, too few for {num_tokens}")


@torch.no_grad()
def read_densely(model: PreTrainedModel, ids: Tensor, *, prompt_tokens: int) -> Dense:
    """Let a stock model read [1, P + T] ids: P in chunks, the others one by one."""
    ids = ids.to(model.device)
    cache = DynamicCache(config=model.config)
    lent = max(0, prompt_tokens - OWN_TOKENS)
    for chunk in ids[:, :lent].split(CHUNK_TOKENS, dim=1) if lent else ():
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    kv = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers] if lent else []
    model(input_ids=ids[:, lent:prompt_tokens], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return Dense(ids, prompt_tokens, kv, _feed(model, ids[:, prompt_tokens:], cache))


@torch.no_grad()
def _feed(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Feed ids [1, T] one by one; returns log probabilities [T, V]."""
    rows = []
    for token in ids.split(1, dim=1):
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]
        rows.append(torch.log_softmax(logits.float(), -1))
    return torch.stack(rows)


def _lend_history(cache: RheoCache, dense: Dense) -> None:
    """Write the keys and values that are there into an empty cache as a prefill would, without its attention."""
    tokens, device = dense.prompt_tokens - OWN_TOKENS, dense.ids.device
    executor = cache.open(1, dense.ids.shape[1], dense.kv[0][0].dtype, device)
    executor.begin_prefill(slice(0, 1), [0], tokens)
    kv, ops = executor.cache, executor.ops
    for i, (k, v) in enumerate(dense.kv):
        start = torch.full((1,), tokens - k.shape[2], dtype=torch.int32, device=device)
        if i in kv.sliding:
            ops.ring_append(k, v, start, kv.sliding[i].k_ring, kv.sliding[i].v_ring)
            continue
        layer = kv.full[i]
        table = kv.host_table
        ops.append_chunk(
            k, v, start, table, layer.k_host, layer.v_host, layer.k_pool, layer.v_pool, layer.slot_of
        )
        if layer.summary is not None:
            ops.summarize_chunk(k, start, table, layer.k_host, layer.summary, summary_kind=layer.summary_kind)
        complete_groups(layer, table, 0, 0, tokens)
        if layer.value_summary is not None:
            ops.summarize_chunk(v, start, table, layer.v_host, layer.value_summary, summary_kind="mean")
    cache.hf_length = tokens


def measure(model: PreTrainedModel, dense: Dense, config: RheoConfig) -> dict[str, Any]:
    """Feed the continuation to the model, offloaded as `config` says; returns the measured fields of a row."""
    offload(model, config, check=False)
    try:
        cache = model.rheo.new_cache(max_length=dense.ids.shape[1])
        if dense.kv:
            _lend_history(cache, dense)
        model.rheo.prefill(cache, dense.ids[:, : dense.prompt_tokens])
        log_probs = _feed(model, dense.ids[:, dense.prompt_tokens :], cache)
        stats = model.rheo.stats(cache)
    finally:
        restore(model)
    exact = dense.log_probs
    kl = (exact.exp() * (exact - log_probs)).sum(-1)
    told = dense.ids[0, dense.prompt_tokens + 1 :, None]
    return {
        "kl_mean": float(kl.mean()),
        "kl_p95": float(kl.quantile(0.95)),
        "same_token": float((exact.argmax(-1) == log_probs.argmax(-1)).float().mean()),
        "nll": float(-log_probs[:-1].gather(1, told).mean()),
        "dense_nll": float(-exact[:-1].gather(1, told).mean()),
        **{name: getattr(stats, name) for name in STATS_FIELDS},
    }


STATS_FIELDS = tuple(f.name for f in fields(FidelityRow))[-7:]


def compare(
    model: PreTrainedModel,
    dense: Dense,
    *,
    name: str,
    budgets: Sequence[int],
    variants: Sequence[str],
    config: RheoConfig,
) -> Iterator[FidelityRow]:
    """Measure every variant at every budget; rows come as they are done.

    Args:
        model: not offloaded; it is offloaded for each row in turn and restored.
        dense: of the same model.
        name: of the model, for the rows.
        budgets: in blocks.
        variants: each a text of `group.key=value` words; empty: `config` as it is.
        config: the common configuration; the pool gets exactly `cache.capacity_ratio` budgets.
    """
    size = config.cache.block_size
    for budget in budgets:
        for variant in variants:
            overrides = [
                f"selection.token_budget={budget * size}",
                "cache.device_memory=floor",
                "audit.every=1",
            ]
            yield FidelityRow(
                model=name,
                dtype=str(model.dtype).removeprefix("torch."),
                device="cpu" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device),
                context_len_tokens=dense.prompt_tokens,
                steps=len(dense.log_probs),
                variant=variant,
                block_size=size,
                budget_blocks=budget,
                **measure(model, dense, config.with_overrides([*overrides, *variant.split()])),
            )


def _line(row: FidelityRow) -> str:
    return (
        f"{row.budget_blocks:>4} blocks  kl {row.kl_mean:.5f}  same {row.same_token:.3f}  "
        f"error {row.output_error_mean or 0:.4f}  mass {row.captured_mass_mean or 0:.4f}  hit {row.hit_rate or 0:.4f}  "
        f"misses {row.h2d_bytes / MIB:.1f} MiB  {row.variant}"
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rheo_offload.eval.fidelity", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default=PACKAGED_MODEL, help="directory or hub id (default: %(default)s)")
    parser.add_argument("--gguf", metavar="FILE", help="GGUF file inside that directory")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's language reference")
    parser.add_argument("--context", type=int, default=8192, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="tokens fed after it (default: %(default)s)")
    parser.add_argument("--budgets", default="8,16,32", metavar="N,N", help="blocks (default: %(default)s)")
    parser.add_argument("--config", default="default", help="packaged name or file (default: %(default)s)")
    parser.add_argument(
        "--vary", action="append", metavar="'group.key=value ...'", help="one variant; repeat for more"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="directory for rows.csv and env.json")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value", help="for all variants")
    args = parser.parse_intermixed_args(argv)
    if args.context < 1 or args.steps < 2:
        parser.error("--context must be at least 1 and --steps at least 2")
    if not all(n.isdecimal() for n in args.budgets.split(",")):
        parser.error(f"--budgets must be numbers of blocks, as 8,16,32, not {args.budgets!r}")
    return args


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RheoError(f"cannot read the text {str(path)!r}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison from the command line; return 0, or 2 after an error this package explains."""
    args = _arguments(argv)
    try:
        config = RheoConfig.from_yaml(args.config).with_overrides(args.overrides)
        budgets, variants = [int(n) for n in args.budgets.split(",")], args.vary or [""]
        for variant in variants:  # a typo shows before the model is read
            config.with_overrides(variant.split())
        text = None if args.text is None else _read(args.text)
        model, tokenizer = load(args.model, gguf=args.gguf, dtype=args.dtype, device=args.device)
        tokens, positions = args.context + args.steps, max_positions(model.config)
        if positions is not None and tokens > positions:
            raise RheoError(
                f"--context {args.context} + --steps {args.steps} is {tokens - positions} more than the model's "
                f"{positions} positions; shorten one of them"
            )
        ids = text_ids(tokenizer, tokens, text)
        args.out.mkdir(parents=True, exist_ok=True)
        words = sys.argv[1:] if argv is None else argv
        env = {
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "rheo_offload.eval.fidelity", *words]),
            "versions": versions(),
            "device": device_facts(model.device),
            "config": config.to_dict(),
        }
        (args.out / "env.json").write_text(json.dumps(env, indent=2) + "\n", encoding="utf-8")
        with (args.out / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(FidelityRow)])
            writer.writeheader()
            dense = read_densely(model, ids, prompt_tokens=args.context)
            for row in compare(
                model, dense, name=args.model, budgets=budgets, variants=variants, config=config
            ):
                writer.writerow(asdict(row))
                file.flush()
                sys.stdout.write(_line(row) + "\n")
                sys.stdout.flush()
    except RheoError as error:
        sys.stderr.write(f"fidelity: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
