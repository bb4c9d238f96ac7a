"""A dense KV cache of fixed size for a captured step, and the attention implementations that may read it.

One query per row, its group's heads folded into one product where the implementation allows, and the length a device
tensor, so that one graph serves every step. `fastest` times the implementations at the shape of a case, inside a graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.decoder import Unsupported
from bench.timing import Quantiles, time_calls
from csrc_free_kernels.launch import attend_splits
from rheo_offload.model.specs import layer_specs
from rheo_offload.ops import kernels_for

NAME = "bench_dense"
TAG = "_bench_dense_cache"
BLOCK_TOKENS = 64
CALLS = 8  # per graph when implementations are compared
SAMPLES = 5
AGREEMENT = 2e-2  # relative difference of two bf16 implementations


class Attention(ABC):
    """Attention of one query per row over a cache; subclasses say how keys and values lie in memory."""

    name: ClassVar[str]
    needs_mask: ClassVar[bool] = False

    def __init__(self, rows: int, num_q_heads: int, shape: tuple[int, int, int], like: torch.Tensor) -> None:
        """Args: shape (KV heads, tokens, head dim) of a row's keys; `like` gives dtype and device."""
        self.rows, self.num_q_heads, self.shape, self.like = rows, num_q_heads, shape, like

    def buffer(self) -> torch.Tensor:
        """Allocate keys (or values) of a layer, [B, Hkv, L, D], whatever the strides."""
        return self.like.new_zeros(self.rows, *self.shape)

    @abstractmethod
    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: torch.Tensor, mask: Any, scale: float
    ) -> torch.Tensor:
        """Attend q [B, Hq, 1, D] to the first `lens[b]` tokens; returns [B, 1, Hq, D]."""


class Sdpa(Attention):
    """torch's scaled_dot_product_attention, the group's heads as queries of their KV head, a mask for the length."""

    name = "sdpa"
    needs_mask = True

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: torch.Tensor, mask: Any, scale: float
    ) -> torch.Tensor:
        grouped = q.reshape(self.rows, self.shape[0], -1, self.shape[2])
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return out.reshape(self.rows, 1, self.num_q_heads, self.shape[2])


class Flash(Attention):
    """torch's FlashAttention-2 kernel with lengths on the device (`seqused_k`): native groups, split over the keys."""

    name = "flash"

    def __init__(self, rows: int, num_q_heads: int, shape: tuple[int, int, int], like: torch.Tensor) -> None:
        super().__init__(rows, num_q_heads, shape, like)
        if like.device.type != "cuda" or like.dtype == torch.float32:
            raise Unsupported("flash attention needs a GPU and 16 bits")
        ends = torch.arange(rows + 1, dtype=torch.int32, device=like.device)
        self.query_starts, self.key_starts = ends, ends * shape[1]

    def buffer(self) -> torch.Tensor:
        heads, tokens, dim = self.shape
        return self.like.new_zeros(self.rows, tokens, heads, dim).transpose(1, 2)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: torch.Tensor, mask: Any, scale: float
    ) -> torch.Tensor:
        packed = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        out = torch.ops.aten._flash_attention_forward(
            *packed, self.query_starts, self.key_starts, 1, self.shape[1], 0.0, False, False,
            scale=scale, seqused_k=lens,
        )[0]  # fmt: skip
        return out.view(self.rows, 1, self.num_q_heads, self.shape[2])


class Paged(Attention):
    """Our own decode attention over all blocks."""

    name = "paged"

    def __init__(self, rows: int, num_q_heads: int, shape: tuple[int, int, int], like: torch.Tensor) -> None:
        super().__init__(rows, num_q_heads, shape, like)
        heads, tokens, dim = shape
        device, blocks = like.device, tokens // BLOCK_TOKENS
        self.ops = kernels_for(device)
        numbers = torch.arange(rows * heads * blocks, dtype=torch.int32, device=device)
        self.slots = numbers.view(rows, heads, blocks)
        self.ids = (self.slots % blocks).contiguous()
        splits = attend_splits(rows * heads, blocks, device)
        self.out_parts = torch.zeros(splits, rows, num_q_heads, dim, device=device)
        self.lse_parts = torch.zeros(splits, rows, num_q_heads, device=device)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lens: torch.Tensor, mask: Any, scale: float
    ) -> torch.Tensor:
        q = q[:, :, 0]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        pools = (t.reshape(-1, BLOCK_TOKENS, self.shape[2]) for t in (k, v))
        logits = {"softmax_scale": scale, "soft_cap": None, "window": None}
        self.ops.attend(q, *pools, self.ids, self.slots, lens, self.out_parts, self.lse_parts, **logits)
        self.ops.merge(self.out_parts, self.lse_parts, None, out, None)
        return out[:, None]


IMPLEMENTATIONS: dict[str, type[Attention]] = {c.name: c for c in (Sdpa, Flash, Paged)}


class DenseCache(DynamicCache):
    """Keys and values of every layer in buffers of `max_length` tokens; transformers sees an empty cache."""

    def __init__(
        self, model: PreTrainedModel, rows: int, max_length: int, implementation: str | None = None
    ) -> None:
        """Allocate.

        Args:
            model: whose layers.
            rows: rows of the batch.
            max_length: longest row, in tokens.
            implementation: a name of `IMPLEMENTATIONS`; None: the fastest at this shape.

        Raises:
            Unsupported: a layer is not plain full attention, or layers differ.
        """
        super().__init__(config=model.config)
        specs = layer_specs(model.config)
        shapes = {(s.num_q_heads, s.num_kv_heads, s.head_dim, s.window) for s in specs}
        if len(shapes) > 1 or specs[0].is_sliding:
            raise Unsupported("the dense cache of the benchmarks holds equal layers of full attention only")
        tokens = -(-max_length // BLOCK_TOKENS) * BLOCK_TOKENS
        like = model.get_input_embeddings().weight
        arguments = (rows, specs[0].num_q_heads, (specs[0].num_kv_heads, tokens, specs[0].head_dim), like)
        self.implementation = implementation or fastest(*arguments)
        self.attention = IMPLEMENTATIONS[self.implementation](*arguments)
        self.buffers = [(self.attention.buffer(), self.attention.buffer()) for _ in specs]
        self.store = kernels_for(like.device).ring_append
        self.token_numbers = torch.arange(tokens, device=like.device)
        self.mask: torch.Tensor | None = None

    def begin(self, positions: torch.Tensor) -> None:
        """Open a forward of tokens at `positions` [B, Q], the same Q for all layers."""
        self.first = positions[:, 0].int()
        self.lens = self.first + positions.shape[1]
        if self.attention.needs_mask or positions.shape[1] > 1:
            self.mask = self.token_numbers <= positions[:, None, :, None]

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store the new tokens; the keys handed back only name this cache."""
        self.store(key_states, value_states, self.first, *self.buffers[layer_idx])
        key_states = key_states.view_as(key_states)
        setattr(key_states, TAG, self)
        return key_states, value_states

    def attend(self, layer_idx: int, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend q [B, Hq, Q, D] to everything stored so far; returns [B, Q, Hq, D]."""
        k, v = self.buffers[layer_idx]
        if q.shape[2] == 1:
            return self.attention(q, k, v, self.lens, self.mask, scale)
        return torch.cat([self._attend_chunk(row, layer_idx, q, scale) for row in range(len(q))]).transpose(
            1, 2
        )

    def _attend_chunk(self, row: int, layer_idx: int, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend a prompt chunk of one row: heads repeated, so that sdpa has a kernel that takes a mask."""
        assert self.mask is not None
        k, v = (
            t[row : row + 1].repeat_interleave(q.shape[1] // t.shape[1], 1) for t in self.buffers[layer_idx]
        )
        return F.scaled_dot_product_attention(
            q[row : row + 1], k, v, attn_mask=self.mask[row : row + 1], scale=scale
        )

    def fill_random(self, tokens: int) -> None:
        """Write random keys and values of `tokens` tokens into every layer."""
        for pair in self.buffers:
            for buffer in pair:
                buffer[:, :, :tokens].normal_()

    @property
    def nbytes(self) -> int:
        """Device memory of keys and values."""
        return sum(t.nbytes for pair in self.buffers for t in pair)


def register() -> None:
    """Make the attention known to transformers."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def _attend(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, *, scaling: float, **other: Any
) -> tuple[torch.Tensor, None]:
    odd = [name for name in ("softcap", "s_aux", "sliding_window") if other.get(name) is not None]
    if odd:
        raise Unsupported(f"the dense cache of the benchmarks knows no {', '.join(odd)}")
    cache = getattr(k, TAG, None)
    if cache is None:  # a layer alone, as when fused modules are checked
        return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **other)
    return cache.attend(module.layer_idx, q, scaling), None


def fastest(rows: int, num_q_heads: int, shape: tuple[int, int, int], like: torch.Tensor) -> str:
    """Return the name of the implementation that is fastest over full buffers, among those that agree with sdpa.

    Times one layer inside a graph and waits for the device. On the CPU: sdpa.
    """
    if like.device.type != "cuda":
        return Sdpa.name
    generator = torch.Generator(like.device).manual_seed(5)
    heads, tokens, dim = shape

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)

    q, k, v = (
        random(rows, num_q_heads, 1, dim),
        random(rows, heads, tokens, dim),
        random(rows, heads, tokens, dim),
    )
    lens = torch.full((rows,), tokens - BLOCK_TOKENS // 2, dtype=torch.int32, device=like.device)
    mask = torch.arange(tokens, device=like.device) < lens[:, None, None, None]
    times: dict[str, float] = {}
    truth = None
    for name, kind in IMPLEMENTATIONS.items():
        try:
            attention = kind(rows, num_q_heads, shape, like)
            keys, values = attention.buffer().copy_(k), attention.buffer().copy_(v)
            out, times[name] = _time(lambda: attention(q, keys, values, lens, mask, dim**-0.5), like.device)  # noqa: B023
        except (Unsupported, RuntimeError):
            continue
        truth = out if truth is None else truth
        if (out - truth).norm() > AGREEMENT * truth.norm():
            del times[name]
    print(f"  dense attention, ms a layer at B={rows}, {tokens} tokens: {times}", flush=True)
    return min(times, key=lambda name: times[name])


def _time(fn: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    """Return the result and the milliseconds of one call, of several in a graph."""
    out = fn()
    fn()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            fn()
    graph.replay()
    return out.float(), Quantiles.of(time_calls(graph.replay, SAMPLES, device)).p50 / CALLS
