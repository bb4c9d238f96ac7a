"""Layers that take the selection of an earlier layer of the same step (IndexCache, DELTA, HyLRA): who may reuse whose.

IndexCache arXiv:2603.12201, HyLRA arXiv:2602.00777, hoenza/DELTA. Neighbouring layers select much the same blocks, so
one of them can choose for several: those that reuse keep no summaries and score nothing. Blocks are resident per layer
all the same.
"""

from collections.abc import Collection, Mapping, Sequence

import torch

from rheo_offload.errors import ConfigError
from rheo_offload.selection.base import LayerSelectors, Selector, method_of
from rheo_offload.selection.heat_ranked import HeatRanked
from rheo_offload.selection.learned_bias import LearnedBias
from rheo_offload.selection.refined import token_rule_of
from rheo_offload.types import LayerSpec


def ranks_itself(method: Selector) -> bool:
    """Whether more than the scores of blocks decides what is attended to: a bias, attention so far, single tokens."""
    return isinstance(method, LearnedBias | HeatRanked) or token_rule_of(method) is not None


def check_reuse(
    reuse_layers: Mapping[int, int],
    reuse_steps: int,
    selector: Selector | LayerSelectors,
    specs: Sequence[LayerSpec],
    dense_layers: Collection[int],
) -> None:
    """Refuse a reuse that means nothing.

    Args:
        reuse_layers: layer -> the layer it takes the selection of.
        reuse_steps: steps that a selection serves.
        selector: the method, with its layers.
        specs: the model's layers.
        dense_layers: those that attend to everything.

    Raises:
        ConfigError: with every reason.
    """
    if not reuse_layers and reuse_steps == 1:
        return
    ranked = ranks_itself(method_of(selector))
    if ranked or not selector.query_aware or selector.normalise == "none":
        key = "reuse_layers" if reuse_layers else "reuse_steps"
        unfit = "does not score, so there is nothing to reuse"
        if ranked:
            unfit = "ranks blocks, or tokens of blocks, anew in every step and layer"
        raise ConfigError(f"selection.{key}: method {selector.name!r} {unfit}")
    by_index = {s.layer_idx: s for s in specs}
    reasons = []
    for layer, source in sorted(reuse_layers.items()):
        why = _reason(layer, source, reuse_layers, by_index, dense_layers)
        if why is None and isinstance(selector, LayerSelectors):
            why = _other_heads(selector.for_layer(layer), selector.for_layer(source), source)
        if why is not None:
            reasons.append(f"layer {layer} cannot reuse layer {source}: {why}")
    if reasons:
        raise ConfigError(f"selection.reuse_layers: {'; '.join(reasons)}")


def _reason(
    layer: int,
    source: int,
    reuse_layers: Mapping[int, int],
    by_index: Mapping[int, LayerSpec],
    dense_layers: Collection[int],
) -> str | None:
    absent = [i for i in (layer, source) if i not in by_index]
    if absent:
        return f"the model has {len(by_index)} layers, {absent[0]} is none of them"
    if source >= layer:
        return "a source comes earlier"
    for i in (layer, source):
        if by_index[i].is_sliding:
            return f"layer {i} has a sliding window and selects nothing"
        if i in dense_layers:
            return f"layer {i} is in selection.dense_layers and attends to everything"
    if source in reuse_layers:
        return f"layer {source} reuses layer {reuse_layers[source]} itself; name that one"
    heads = by_index[layer].num_kv_heads, by_index[source].num_kv_heads
    return None if heads[0] == heads[1] else f"it has {heads[0]} KV heads, not {heads[1]}"


def _other_heads(layer: Selector, source: Selector, number: int) -> str | None:
    """Whether heads have other classes (DuoAttention) in the two layers."""
    here, there = (getattr(s, "streams", None) for s in (layer, source))
    if here is None or there is None or torch.equal(here, there):
        return None
    return f"other heads stream in layer {number}"
