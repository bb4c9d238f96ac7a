"""The subjects of the decode suite by name."""

from transformers import PreTrainedModel

from bench.decoder import Decoder, HFOffloaded, NoAttention, Reference, Unsupported
from bench.graphed import DenseGraph, DenseGraphStock, NoAttentionGraph, NoAttentionGraphStock
from bench.ours import OURS, Rheo
from rheo_offload.config import RheoConfig

__all__ = [
    "BASELINES",
    "DEFAULT_BASELINES",
    "Decoder",
    "NoAttention",
    "Reference",
    "Rheo",
    "Unsupported",
    "make",
]

BASELINES: dict[str, type[Decoder]] = {
    c.name: c
    for c in (
        Decoder, HFOffloaded, NoAttention, DenseGraph, DenseGraphStock, NoAttentionGraph, NoAttentionGraphStock,
    )
} | {name: kind for name, kind in OURS.items() if kind is not Rheo}  # fmt: skip

DEFAULT_BASELINES = ("stock", "hf-offloaded", "dense-graph", "no-attention-graph")


def make(name: str, model: PreTrainedModel, config: RheoConfig) -> Decoder:
    """Make a subject; ours take the configuration."""
    if name in OURS:
        return OURS[name](model, config)
    return BASELINES[name](model)
