"""Calibrate a model: windows of text through it, each layer's heads fitted, scored, and written to one side file."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rheo_offload.calibration.capture import Sample, capture
from rheo_offload.calibration.data import Windows
from rheo_offload.calibration.fit import EvictionHead, FitOptions, Fitted, GateHead, Target, fit
from rheo_offload.calibration.score import WARM_QUERIES, Budget, Score, compare
from rheo_offload.errors import CalibrationError
from rheo_offload.model.gates import gate_tensors
from rheo_offload.model.learned_heads import HeadsInfo, save_heads
from rheo_offload.model.rope import layer_ropes
from rheo_offload.model.specs import config_problems, layer_specs, max_positions, text_config
from rheo_offload.types import LayerSpec

logger = logging.getLogger("rheo_offload")

# Samples held at a time; more layers than fit are done in several passes over the text.
SAMPLE_BYTES = 4 << 30

Progress = Callable[[str, int], AbstractContextManager[Callable[[str], None]]]
"""(what, how many) -> context whose value is called once for each, with a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What is fitted, on what, how."""

    kind: Literal["eviction", "gate", "both"] = "both"
    target: Target = "peak"
    """What the gate is fitted to; see `fit.GateHead`."""
    block_size: int = 64
    """Tokens in a block; the gate belongs to that block size."""
    token_budget: int
    """Tokens a step attends to in the score; sink and recent blocks of it are none of the eviction head's business."""
    queries: int = 512
    """Queries of a window that are fitted on, spread evenly over what is longer than the budget."""
    score_steps: int = 192
    """Decode steps of the last window that the score replays."""
    shares: tuple[float, ...] = (0.5,)
    """Query-agnostic shares that the score tries."""
    fit: FitOptions = field(default_factory=FitOptions)

    @property
    def budget(self) -> Budget:
        """The budget of the score: one sink block, a quarter recent, as the defaults of `selection` are."""
        blocks = self.token_budget // self.block_size
        return Budget(blocks=blocks, sink=1, recent=max(1, blocks // 4), share=self.shares[0])

    def check(self, context: int) -> None:
        """Refuse windows of `context` tokens that these options do not go with.

        Raises:
            CalibrationError: the budget leaves no choice, or takes too much of the window; or too few queries.
        """
        budget, blocks = self.budget, context // self.block_size
        if budget.blocks <= budget.sink + budget.recent or blocks < 2 * budget.blocks:
            raise CalibrationError(
                f"a window of {context} tokens has {blocks} blocks of {self.block_size}, and the budget is "
                f"{budget.blocks}, of which {budget.sink + budget.recent} are forced: the budget must leave a "
                "choice, and be at most half the window"
            )
        needed = WARM_QUERIES + self.score_steps
        if needed > context // 2:
            raise CalibrationError(
                f"a window of {context} tokens is too short for {needed} scored queries: give a longer --context, "
                "or fewer --score-steps"
            )


@dataclass(slots=True)
class Calibration:
    """What was found."""

    eviction: dict[int, Fitted] = field(default_factory=dict)
    gate: dict[int, Fitted] = field(default_factory=dict)
    samples: dict[int, Sample] = field(default_factory=dict)
    """Each layer's last window, for the score."""

    def scores(self, options: CalibrationOptions) -> list[tuple[str, str, float, Score]]:
        """Return the rows of `score.compare`."""
        heads: list[dict[int, Any]] = [{i: f.head for i, f in x.items()} for x in (self.eviction, self.gate)]
        return compare(self.samples, options.budget, eviction=heads[0], gate=heads[1], shares=options.shares)


def check_out(path: str) -> None:
    """Refuse a place that cannot be written.

    Raises:
        CalibrationError: its folder is missing or read-only, or it is no safetensors name.
    """
    out = Path(path)
    if out.suffix != ".safetensors":
        raise CalibrationError(f"--out must end in .safetensors, not {path!r}")
    if not out.parent.is_dir():
        raise CalibrationError(f"cannot write {path!r}: {str(out.parent)!r} is no directory")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise CalibrationError(f"cannot write {path!r}: no permission")


def check_model(model: PreTrainedModel, context: int) -> list[LayerSpec]:
    """Return the layers to fit in windows of `context` tokens.

    Raises:
        CalibrationError: with every reason why there is nothing to fit.
        UnsupportedModelError: a rotary embedding that cannot be undone.
    """
    problems = config_problems(model.config)
    if "rheo" in model.__dict__:
        problems.append("it is offloaded; restore(model) first")
    longest = max_positions(model.config)
    if longest is not None and context > longest:
        problems.append(
            f"windows of {context} tokens are longer than the {longest} positions it was made for"
        )
    if problems:
        raise CalibrationError("this model cannot be calibrated: " + "; ".join(problems))
    specs = [s for s in layer_specs(model.config) if not s.is_sliding]
    if not specs:
        raise CalibrationError("this model cannot be calibrated: it has no full-attention layer")
    layer_ropes(model, specs)
    return specs


def calibrate(
    model: PreTrainedModel,
    windows: Windows,
    options: CalibrationOptions,
    *,
    progress: Progress = lambda what, count: nullcontext(lambda note: None),
) -> Calibration:
    """Fit the heads of every full-attention layer, each alone.

    Args:
        model: in eval mode, not offloaded; it is not changed.
        windows: of its tokens.
        options: see there.
        progress: shown what goes on.

    Raises:
        CalibrationError: as `check_model` and `CalibrationOptions.check`.
    """
    options.check(len(windows.score))
    specs = check_model(model, len(windows.score))
    found = Calibration()
    for part in _passes(specs, windows, options, next(model.parameters()).dtype):
        names = [s.layer_idx for s in part]
        texts = [*windows.fit, windows.stop, windows.score]
        by_window = []
        with progress("reading", len(texts) * len(part)) as tick:
            for n, tokens in enumerate(texts):
                at = _positions(len(tokens), options, scored=n == len(texts) - 1)
                by_window.append(
                    capture(
                        model,
                        tokens,
                        at,
                        block_size=options.block_size,
                        layers=names,
                        progress=lambda: tick(""),
                    )  # fmt: skip
                )
        _fit_layers(model, part, by_window, options, found, progress)
    return found


def save(
    path: str, model: PreTrainedModel, found: Calibration, options: CalibrationOptions, source: str
) -> None:
    """Write the side file; `source` says what text the heads were fitted on."""
    layers: dict[int, dict[str, Tensor]] = {}
    for i, fitted in found.eviction.items():
        head: Any = fitted.head
        named = {"delta.weight": head.weight, "delta.bias": head.offset, "A": head.scale}
        layers.setdefault(i, {}).update({f"self_attn.{name}": t.detach() for name, t in named.items()})
    for i, fitted in found.gate.items():
        gate: Any = fitted.head
        layers.setdefault(i, {}).update({n: t.detach() for n, t in gate_tensors(gate.gate).items()})
    methods = [m for m, heads in (("nosa", found.eviction), ("seer_r", found.gate)) if heads]
    losses = {
        kind: f"{_mean(f.before for f in heads.values()):.4f} -> {_mean(f.after for f in heads.values()):.4f}"
        for kind, heads in (("eviction", found.eviction), ("gate", found.gate))
        if heads
    }
    fitting = dataclasses.asdict(options.fit)
    fitting |= {name: getattr(options, name) for name in ("block_size", "queries", "target", "token_budget")}
    info = HeadsInfo.of(
        layer_specs(model.config),
        model_type=text_config(model.config).model_type,
        method=", ".join(methods),
        provenance=f"rheo calibrate: {source}; {fitting}; held-out loss {losses}",
        gate_block_size=options.block_size if found.gate else 0,
    )
    save_heads(path, layers, info)


def _fit_layers(
    model: PreTrainedModel,
    specs: Sequence[LayerSpec],
    by_window: Sequence[dict[int, Sample]],
    options: CalibrationOptions,
    found: Calibration,
    progress: Progress,
) -> None:
    """Fit the layers of one pass; of `by_window` the last two windows are held out."""
    kinds = ("eviction", "gate") if options.kind == "both" else (options.kind,)
    ropes = layer_ropes(model, specs) if "gate" in kinds else {}
    forced = (options.budget.sink, options.budget.recent)
    settings = options.fit
    with progress("fitting", len(specs) * len(kinds)) as tick:
        for spec in specs:
            i, heads, dim = spec.layer_idx, spec.num_kv_heads, spec.head_dim
            *samples, stop, score = [window[i] for window in by_window]
            found.samples[i] = score
            for kind in kinds:
                head: EvictionHead | GateHead
                if kind == "eviction":
                    head = EvictionHead(heads, dim, forced=forced, seed=settings.seed)
                else:
                    scale = score.softmax_scale
                    head = GateHead(
                        heads, spec.group_size, dim, ropes[i],
                        softmax_scale=scale, forced=forced, target=options.target,
                    )  # fmt: skip
                fitted = fit(head, samples, stop, settings)
                getattr(found, kind)[i] = fitted
                tick(f"layer {i} {kind} {fitted.before:.3f} -> {fitted.after:.3f} in {fitted.steps} steps")


def _positions(tokens: int, options: CalibrationOptions, *, scored: bool) -> Tensor:
    """Return the queries of a window to keep: the last ones for the score, else spread over what has a choice."""
    if scored:
        return torch.arange(tokens - WARM_QUERIES - options.score_steps, tokens)
    first = min((options.budget.blocks + 1) * options.block_size, tokens // 2)
    count = min(options.queries, tokens - first)
    return torch.linspace(first, tokens - 1, count).long().unique()


def _passes(
    specs: Sequence[LayerSpec], windows: Windows, options: CalibrationOptions, dtype: torch.dtype
) -> list[list[LayerSpec]]:
    """Split the layers so that the samples of each part stay within `SAMPLE_BYTES`."""
    context = len(windows.score)
    blocks = context // options.block_size

    def size(s: LayerSpec) -> int:
        values = context * s.num_kv_heads * s.head_dim * dtype.itemsize
        queries = options.queries * (2 * s.num_q_heads * s.head_dim + 2 * s.num_kv_heads * blocks) * 4
        return (len(windows.fit) + 2) * (values + queries + 16 * blocks * s.num_kv_heads * s.head_dim)

    parts: list[list[LayerSpec]] = [[]]
    for spec in specs:
        if parts[-1] and sum(map(size, [*parts[-1], spec])) > SAMPLE_BYTES:
            parts.append([])
        parts[-1].append(spec)
    if len(parts) > 1:
        logger.info("calibration: %d passes over the text, %d layers each", len(parts), len(parts[0]))
    return parts


def _mean(values: Any) -> float:
    held = list(values)
    return float(sum(held) / len(held))
