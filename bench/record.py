"""Watch which blocks a real model selects.

The stock model reads a real text densely, then its own continuation is fed token by token (teacher forcing, so that a
small base model cannot fall into a loop) while its full-attention layers see the selected blocks only. Scores,
selection and heat are the reference ops; the runtime itself takes no part, so a recording does not depend on it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from csrc_free_kernels.reference.score_mean import score_mean
from csrc_free_kernels.reference.select import select
from rheo_offload.selection.base import normalised
from rheo_offload.types import Policy

NAME = "rheo-recorder"
HEAT_QUERIES = 64  # as the runtime's prefill: the last queries of a prompt start the heat
AHEAD = (1, 2, 6)
"""How many layers ahead a query is guessed from the hidden state (or from the first layer's)."""


class _Preallocated(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values in one buffer: the stock layer copies all of them for every new token."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self._max_tokens = max_tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self._max_tokens, key_states.shape[3])
            self._store = key_states.new_empty(2, *shape)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self._store[0, :, :, start:end], self._store[1, :, :, start:end] = key_states, value_states
        self.keys, self.values = self._store[0, :, :, :end], self._store[1, :, :, :end]
        return self.keys, self.values


@dataclass(slots=True)
class Layer:
    """State of one full-attention layer. N blocks; `heat` and `scores` [1, Hkv, N] fp32."""

    summary: Tensor
    """[N, Hkv, 1, D] fp32: mean key of every closed block."""
    heat: Tensor
    steps: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    """What was recorded, one [Hkv, ...] array per step."""

    def note(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        """Keep [1, Hkv, ...] of this step."""
        self.steps.setdefault(name, []).append(value[0].to(dtype).numpy().copy())


@dataclass(slots=True)
class Prefix:
    """A prompt that was read: what every policy starts from."""

    cache: DynamicCache
    layers: dict[int, Layer]
    num_tokens: int


class Recorder:
    """Attention of a stock model whose decode steps select blocks. One row, fp32."""

    def __init__(self, model: PreTrainedModel, *, block_size: int, max_blocks: int) -> None:
        """Attach to a model that is not offloaded; `max_blocks` bounds prompt and recorded steps."""
        self.model, self.block_size, self.max_blocks = model, block_size, max_blocks
        self.full = [
            i for i, m in enumerate(model.model.layers) if not getattr(m.self_attn, "is_sliding", False)
        ]
        self._layers: dict[int, Layer] = {}
        self._policy: Policy | None = None  # None: reading the prompt
        self._hidden: dict[int, Tensor] = {}
        self._guesses: dict[int, Tensor] = {}
        self._table = torch.arange(max_blocks, dtype=torch.int32)[None]
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)

    # ---- runs ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, ids: Tensor, *, chunk_tokens: int = 1024) -> Prefix:
        """Read a prompt [1, P] of whole blocks densely; summaries and heat are made as the runtime makes them."""
        if ids.shape[1] % self.block_size:
            raise ValueError(f"a prompt of {ids.shape[1]} tokens is not whole blocks of {self.block_size}")
        self._layers, self._policy = {}, None
        cache = DynamicCache(config=self.model.config)
        for i in self.full:
            cache.layers[i] = _Preallocated(self.max_blocks * self.block_size)
        for at in range(0, ids.shape[1], chunk_tokens):
            self.model.model(input_ids=ids[:, at : at + chunk_tokens], past_key_values=cache, use_cache=True)
        return Prefix(cache, self._layers, ids.shape[1])

    @torch.no_grad()
    def decode(self, prefix: Prefix, policy: Policy, ids: Tensor) -> dict[int, dict[str, NDArray[Any]]]:
        """Feed the continuation [1, T] through selected blocks; the prefix is not changed.

        Returns:
            Per full-attention layer, KV heads first: `selected` [Hkv, T, S], `early` [Hkv, T, A], `scores`, `mass`
            (share of the full softmax per block, mean over the group) and `ahead1`, ... [Hkv, T, N],
            `start_heat` [Hkv, N].
        """
        cache, self._policy = copy.deepcopy(prefix.cache), policy
        self._layers = {i: Layer(s.summary.clone(), s.heat.clone()) for i, s in prefix.layers.items()}
        with self._watching_hidden_states():
            for t in range(ids.shape[1]):
                self.model.model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        return {
            i: {name: np.stack(values, axis=1) for name, values in layer.steps.items()}
            | {"start_heat": prefix.layers[i].heat[0].numpy()}
            for i, layer in self._layers.items()
        }

    # ---- one layer -------------------------------------------------------------------------------------------------

    def _attend(
        self,
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        **other: Any,
    ) -> tuple[Tensor, None]:
        """The attention function: q [1, Hq, Q, D]; k, v [1, Hkv, T, D] of the cache, after RoPE."""
        if module.layer_idx in self.full:
            if self._policy is not None:
                return self._attend_selected(module.layer_idx, q, k, v, scaling), None
            self._start(module.layer_idx, q, k, scaling)
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **other)

    def _start(self, layer_idx: int, q: Tensor, k: Tensor, scaling: float) -> None:
        """Rebuild summaries and heat from what the prompt has so far; the last chunk's stay."""
        heads, size = k.shape[1], self.block_size
        closed = k.shape[2] // size
        summary = torch.zeros(self.max_blocks, heads, 1, k.shape[3])
        blocks = k[0, :, : closed * size].float().unflatten(1, (closed, size))
        summary[:closed] = blocks.mean(2).transpose(0, 1)[:, :, None]
        last = q[:, :, -HEAT_QUERIES:].unflatten(1, (heads, -1)).flatten(1, 3)
        heat = normalised(self._score(last, summary, k.shape[2], scaling), "sum")
        self._layers[layer_idx] = Layer(summary, heat)

    def _score(self, q: Tensor, summary: Tensor, seq_len: int, scaling: float) -> Tensor:
        """Score q [1, Hkv * any, D]: fp32 [1, Hkv, N]."""
        scores = torch.empty(1, summary.shape[1], self.max_blocks)
        score_mean(
            q, summary, self._table, torch.tensor([seq_len], dtype=torch.int32), None, None, scores,
            softmax_scale=scaling, block_size=self.block_size,
        )  # fmt: skip
        return scores

    def _select(
        self, scores: Tensor | None, heat: Tensor, seq_len: int, policy: Policy, *, query_blocks: int
    ) -> Tensor:
        """Select as the runtime does (and update the heat, when there are scores): int32 [1, Hkv, blocks]."""
        count = policy.sink_blocks + policy.recent_blocks + query_blocks + policy.agnostic_blocks
        selected = torch.empty(1, heat.shape[1], count, dtype=torch.int32)
        select(
            scores, heat, torch.tensor([seq_len], dtype=torch.int32), selected, torch.empty(1, heat.shape[1]),
            block_size=self.block_size, sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks,
            query_blocks=query_blocks, agnostic_blocks=policy.agnostic_blocks,
            heat_decay=policy.heat_decay, normalise="none" if scores is None else "sum",
        )  # fmt: skip
        return selected

    def _attend_selected(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        layer, policy, seq_len, size = self._layers[layer_idx], self._policy, k.shape[2], self.block_size
        assert policy is not None
        if seq_len % size == 0:
            layer.summary[seq_len // size - 1] = k[0, :, -size:].float().mean(1, keepdim=True)
        certain = self._select(None, layer.heat, seq_len, policy, query_blocks=0)
        early = certain[:, :, policy.sink_blocks : policy.sink_blocks + policy.agnostic_blocks]
        scores = self._score(q[:, :, 0], layer.summary, seq_len, scaling)
        selected = self._select(scores, layer.heat, seq_len, policy, query_blocks=policy.query_blocks)
        layer.note("selected", selected, torch.uint16)
        layer.note("early", early, torch.uint16)
        layer.note("scores", scores, torch.float32)
        for distance, guess in self._guesses.items():
            guessed = self._score(guess, layer.summary, seq_len, scaling)
            layer.note(f"ahead{distance}", guessed, torch.float32)
        return self._attend_blocks(layer, selected, q, k, v, scaling)

    def _attend_blocks(
        self, layer: Layer, selected: Tensor, q: Tensor, k: Tensor, v: Tensor, scaling: float
    ) -> Tensor:
        """Attend to the selected tokens, [1, 1, Hq, D]; note how the full softmax is spread over the blocks."""
        heads, seq_len, size = k.shape[1], k.shape[2], self.block_size
        logits = scaling * q[0, :, 0].unflatten(0, (heads, -1)) @ k[0].mT  # [Hkv, G, T]
        mass = torch.zeros(heads, self.max_blocks * size)
        mass[:, :seq_len] = logits.softmax(-1).mean(1)
        layer.note("mass", mass.unflatten(1, (-1, size)).sum(-1)[None], torch.float32)
        allowed = torch.zeros(heads, self.max_blocks, dtype=torch.bool).scatter_(1, selected[0].long(), True)
        tokens = allowed.repeat_interleave(size, 1)[:, None, :seq_len]
        out = logits.masked_fill(~tokens, -torch.inf).softmax(-1) @ v[0]
        return out.flatten(0, 1)[None, None]

    # ---- guesses of a later layer's query --------------------------------------------------------------------------

    @contextmanager
    def _watching_hidden_states(self) -> Iterator[None]:
        """Before every full layer, guess its query from the hidden states that entered earlier layers."""

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = module.self_attn.layer_idx
            self._hidden[index] = args[0]
            if index in self.full:
                rope = kwargs["position_embeddings"]
                self._guesses = {d: _query(module, self._hidden[max(0, index - d)], rope) for d in AHEAD}

        layers = self.model.model.layers
        handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._hidden, self._guesses = {}, {}


def _query(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Return the query [1, Hq, D] that this decoder layer would make of a hidden state [1, 1, hidden]."""
    attention = layer.self_attn
    q = attention.q_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        q = attention.q_norm(q)
    cos, sin = (part[:, :, None] for part in rope)
    first, second = q.chunk(2, -1)
    return (q * cos + torch.cat([-second, first], -1) * sin)[:, 0]
