"""The fused suite: the attention-free decode step in one CUDA graph, with the model's own modules and with fused ones.

Ahead of each step its matrix products are timed, torch's against every candidate of `linear_few`, over the weights of
all layers in turn (so that none is left in the L2 cache); the candidates that won then run in a step of their own. What
the launch table says of `linear_few` does not matter here. On the CPU steps run eagerly and there are no products.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from bench.baselines import NoAttention
from bench.few_rows import CONFIGS, best_entries, entry, only
from bench.schema import Row
from bench.shapes import model_bytes, weight_bytes
from bench.timing import Quantiles, Rates, flusher, time_calls
from csrc_free_kernels import launch
from rheo_offload.model.fused import STATE, fuse
from rheo_offload.ops import kernels_for

ROUNDS = 5
WARMUP = 3
# Largest relative difference of the logits to those of the model's own modules. Products are merged and residuals added
# in another order, which over 32 layers of random bf16 weights makes percents.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class Fused(NoAttention):
    """The attention-free forward with fused modules and torch's products."""

    name = "no-attention-fused"
    entries: Sequence[dict[str, Any]] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        report = fuse(self.model)
        if not report.is_complete:
            raise ValueError(str(report))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with only(self.entries):
            return super().forward(input_ids, positions)


class FusedFew(Fused):
    """The same, with the products of `linear_few` where the table's `entries` say so."""

    name = "no-attention-fused-few"

    def __init__(self, model: PreTrainedModel, entries: Sequence[dict[str, Any]]) -> None:
        super().__init__(model)
        self.entries = entries


def run_fused(
    model: PreTrainedModel,
    model_name: str,
    batch_sizes: Sequence[int],
    steps: int,
    rates: Rates,
    add: Callable[[Row], None],
) -> list[Row]:
    """Time the products and then the steps, in turns, for every batch size; hands every row to `add`.

    Returns the rows of the products.

    Args:
        model: on its device; its parameters become views of merged buffers.
        model_name: for the rows.
        batch_sizes: rows of one token each.
        steps: timed steps per subject and batch size, at least `ROUNDS`.
        rates: what floors divide by.
        add: takes each row.
    """
    base = Row(
        suite="fused",
        case_id=model_name,
        metric="step",
        unit="ms",
        bytes_moved=0,
        floor_ms=1e3 * weight_bytes(model) / rates.memory,
        model=model_name,
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=model_bytes(model),
    )
    fused = Fused(model)  # ahead of every graph: it moves the weights, whose addresses a graph keeps
    products: list[Row] = []
    with torch.inference_mode():
        for batch in batch_sizes:
            at = replace(base, batch=batch)
            subjects = [NoAttention(model), fused]
            if model.device.type == "cuda":
                rows = list(_products(fused.model, at, rates))
                if batch <= launch.FEW_ROWS:
                    subjects.append(FusedFew(model, best_entries(rows, model.device)))
                for row in rows:
                    add(row)
                products += rows
            for row in _steps(subjects, at, steps):
                add(row)
    return products


def _steps(subjects: Sequence[NoAttention], base: Row, steps: int) -> Iterator[Row]:
    device = subjects[0].model.device
    calls, logits = {}, {}
    for subject in subjects:
        ids = torch.arange(base.batch or 1, device=device)[:, None]
        subject.start(ids, fill="random", max_length=1)
        logits[subject.name], calls[subject.name] = captured(
            lambda s=subject: s.forward(s.ids, s.positions), device
        )
    stock = logits[subjects[0].name].float()
    errors = {name: float((x.float() - stock).norm() / stock.norm()) for name, x in logits.items()}
    times: dict[str, list[float]] = {s.name: [] for s in subjects}
    medians: dict[str, list[float]] = {s.name: [] for s in subjects}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            part = time_calls(call, max(1, steps // ROUNDS), device)
            times[name] += part
            medians[name].append(Quantiles.of(part).p50)
    for name, samples in times.items():
        row = replace(base, case_id=f"{base.model}-b{base.batch}-{name}", baseline=name)
        if not errors[name] <= LIMIT[subjects[0].model.dtype]:
            yield replace(row, status="wrong", error=f"logits differ by {errors[name]:.1e}")
            continue
        q = Quantiles.of(samples)
        noise = (max(medians[name]) - min(medians[name])) / q.p50
        row = replace(row, p20=q.p20, p50=q.p50, p80=q.p80, n=q.n, noise_frac=noise)
        yield replace(row, frac_of_floor=(base.floor_ms or 0) / q.p50)


def captured(fn: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], object]]:
    """Return a copy of what `fn` gives and a call that does it again.

    The call is a graph replay on a GPU and `fn` itself on the CPU.
    """
    if device.type != "cuda":
        return _copy(fn()), fn
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            fn()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fn()
    graph.replay()
    return _copy(result), graph.replay


def _copy(result: Any) -> Any:
    return None if result is None else result.clone()


def _products(model: PreTrainedModel, base: Row, rates: Rates) -> Iterator[Row]:
    """Time every kind of product of a step as torch does it and with every candidate of `linear_few`."""
    device, rows = model.device, base.batch or 1
    few = kernels_for(device).linear_few
    for name, weights in _weights(model).items():
        out_features, in_features = weights[0].shape
        x = torch.randn(rows, in_features, dtype=model.dtype, device=device)
        out = torch.zeros(rows, out_features, dtype=model.dtype, device=device)
        moved = weights[0].nbytes + x.nbytes + out.nbytes
        row = replace(
            base, metric="time", floor_ms=1e3 * moved / rates.memory, flops=2 * rows * weights[0].numel()
        )

        def timed(
            baseline: str,
            product: Callable[[torch.Tensor], object],
            row: Row = row,
            name: str = name,
            w: Any = weights,
        ) -> Row:
            shape = "x".join(str(n) for n in w[0].shape)
            row = replace(
                row, case_id=f"{row.model}-m{row.batch}-{name}-{baseline}-{shape}", baseline=baseline
            )
            return _timed(row, product, w, device)

        yield timed("torch", lambda w, x=x: F.linear(x, w))
        added = name == "down"  # as the fused layers do it: to the residual stream
        if added:
            yield timed("torch-add", lambda w, x=x, out=out: out.addmm_(x, w.t()))
        for config in CONFIGS if rows <= launch.FEW_ROWS else ():
            shape = tuple(weights[0].shape)
            with only([entry(shape, config, rows, launch.arch_of(device), x.itemsize)]):
                label = "few-" + "x".join(str(n) for n in config)
                row = timed(label, lambda w, x=x, out=out, add=added: few(x, w, out, add=add))
                few(x, weights[-1], out.zero_(), add=added)
            truth = F.linear(x.float(), weights[-1].float())
            error = float((out.float() - truth).norm() / truth.norm())
            if not error <= LIMIT[x.dtype]:
                none = dict.fromkeys(("p20", "p50", "p80", "frac_of_floor"))
                row = replace(row, **none, status="wrong", error=f"the product differs by {error:.1e}")
            yield row


def _weights(model: PreTrainedModel) -> dict[str, list[torch.Tensor]]:
    """Every kind of product of a step -> its weight in every layer."""
    layers: Any = model.model.layers
    states = [layer.__dict__[STATE] for layer in layers]
    return {
        "qkv": [s.qkv.weight for s in states],
        "o": [layer.self_attn.o_proj.weight for layer in layers],
        "gate_up": [s.gate_up.weight for s in states],
        "down": [layer.mlp.down_proj.weight for layer in layers],
        "head": [model.get_output_embeddings().weight],
    }


def _timed(
    row: Row,
    product: Callable[[torch.Tensor], object],
    weights: Sequence[torch.Tensor],
    device: torch.device,
) -> Row:
    """Fill in the time of one product, from a graph of the products with all weights."""

    def every() -> None:
        for weight in weights:
            product(weight)

    _, call = captured(every, device)
    times = time_calls(call, 10, device, before=flusher(device))
    q = Quantiles.of(times).map(lambda ms: ms / len(weights))
    return replace(row, p20=q.p20, p50=q.p50, p80=q.p80, n=q.n, frac_of_floor=(row.floor_ms or 0) / q.p50)
