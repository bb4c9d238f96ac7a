"""Baselines whose step is one CUDA graph, captured and replayed by the same code as ours (`execution/graph.py`).

Ids and positions live in buffers; a step is the forward, the greedy choice and the move to the next position. On the
CPU the same step runs eagerly.
"""

from collections.abc import Hashable
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.decoder import Decoder, NoAttention
from bench.dense import NAME as DENSE_ATTENTION
from bench.dense import DenseCache, register
from rheo_offload.execution.graph import GraphRunner


class Graphed(Decoder):
    """A decoder with a captured step. Subclasses have a cache whose tensors keep their addresses."""

    runner: GraphRunner | None = None

    def start(self, input_ids: torch.Tensor, *, fill: str, max_length: int) -> None:
        super().start(input_ids, fill=fill, max_length=max_length)
        self.ids, self.positions = self.ids.clone(), self.positions.clone()
        self.runner = GraphRunner(input_ids.device, (len(input_ids),))

    def step(self) -> None:
        assert self.runner is not None
        self.runner.run(self._step, len(self.ids), version=0)

    def _step(self, rows: int, variant: Hashable) -> None:
        self.ids.copy_(self.forward(self.ids, self.positions).argmax(-1, keepdim=True))
        self.positions += 1

    def why_eager(self) -> str:
        if self.ids.device.type != "cuda":
            return ""
        assert self.runner is not None
        return self.runner.why_eager(len(self.ids)) or ("" if self.runner.captured else "not captured yet")

    def close(self) -> None:
        if self.runner is not None:
            self.runner.close()
        super().close()


class NoAttentionGraph(Graphed, NoAttention):
    """The fused forward without attention and cache in a graph: what the targets of a step start from."""

    name = "no-attention-graph"
    fused = "auto"


class NoAttentionGraphStock(NoAttentionGraph):
    """The same with the model's own modules."""

    name = "no-attention-graph-stock"
    fused = "off"


class DenseGraph(Graphed):
    """Dense attention over a resident cache, fused modules, in a graph: the strongest dense peer.

    Keys and values are in one buffer per layer; the token is stored by one launch, the length is device data. Of the
    implementations of `bench.dense` the one that is fastest at the case's shape attends; the rows name it.
    """

    name = "dense-graph"
    attention = DENSE_ATTENTION
    fused = "auto"

    def __init__(self, model: PreTrainedModel, *, implementation: str | None = None) -> None:
        """Take a view of `model`.

        Args:
            model: its weights are shared.
            implementation: a name of `bench.dense.IMPLEMENTATIONS`; None: the fastest.
        """
        register()
        super().__init__(model)
        self.implementation = implementation

    def new_cache(self, rows: int, max_length: int) -> Any:
        cache = DenseCache(self.model, rows, max_length, self.implementation)
        self.note = f"attention={cache.implementation}"
        return cache

    def fill_random(self, rows: int, tokens: int) -> None:
        self.cache.fill_random(tokens)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.cache.begin(positions)
        return super().forward(input_ids, positions)

    def device_kv_bytes(self) -> int:
        return int(self.cache.nbytes)


class DenseGraphStock(DenseGraph):
    """The same with the model's own modules."""

    name = "dense-graph-stock"
    fused = "off"
