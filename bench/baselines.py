"""The subjects of the decode suite: the offloaded model and what it is compared with, behind one interface.

Every subject has its own module tree over the same weights (`shapes.view`), so that they can take turns.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from bench.shapes import view
from bench.timing import RegionProfiler
from rheo_offload.config import RheoConfig
from rheo_offload.model.offload import offload, restore
from rheo_offload.model.specs import layer_specs

CHUNK_TOKENS = 2048
NO_ATTENTION = "bench_no_attention"


class Unsupported(Exception):
    """The subject cannot run here; the message says why."""


class Decoder:
    """A model, its cache and every row's next token; the base class is stock: sdpa and DynamicCache."""

    name: ClassVar[str] = "stock"
    attention: ClassVar[str] = "sdpa"

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a view of `model`; its weights are shared, its attention is this subject's own."""
        self.model = view(model, self.attention)
        self.cache: Any = None

    def new_cache(self, rows: int, max_length: int) -> Any:
        """Return an empty cache for `rows` rows of up to `max_length` tokens."""
        return DynamicCache(config=self.model.config)

    def start(self, input_ids: torch.Tensor, *, fill: str, max_length: int) -> None:
        """Fill a new cache with the prompt and put one more token in line.

        Args:
            input_ids: [B, L] int64 on the model's device; the last column is the first token to decode.
            fill: `prefill` reads the other L - 1 tokens; `random` writes random keys and values.
            max_length: longest row of this session, in tokens.
        """
        rows, length = input_ids.shape
        self.cache = self.new_cache(rows, max_length)
        if length > 1 and fill == "prefill":
            self.prefill(input_ids[:, :-1])
        elif length > 1:
            self.fill_random(rows, length - 1)
        self.ids = input_ids[:, -1:]
        self.positions = torch.full_like(self.ids, length - 1)

    def prefill(self, input_ids: torch.Tensor) -> None:
        """Read the prompt in chunks."""
        for start in range(0, input_ids.shape[1], CHUNK_TOKENS):
            chunk = input_ids[:, start : start + CHUNK_TOKENS]
            positions = torch.arange(start, start + chunk.shape[1], device=chunk.device).expand_as(chunk)
            self.forward(chunk, positions)

    def fill_random(self, rows: int, tokens: int) -> None:
        """Write random keys and values of `tokens` tokens into every layer."""
        generator = torch.Generator(self.model.device).manual_seed(1)
        for layer_idx, (heads, dim) in enumerate(_kv_shapes(self.model)):
            self.cache.update(*_random_kv(self.model, generator, (rows, heads, tokens, dim)), layer_idx)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the unchanged forward; returns the logits of the last position [B, vocabulary]."""
        out = self.model(
            input_ids=input_ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def step(self) -> None:
        """Decode one greedy token per row; nothing waits for the device."""
        self.ids = self.forward(self.ids, self.positions).argmax(-1, keepdim=True)
        self.positions = self.positions + 1

    def before_step(self, miss_rate: float) -> Callable[[], object] | None:
        """Return what to do ahead of every step to force misses, or None."""
        return None

    def stats(self) -> dict[str, Any]:
        """Return counters since the start of the session; only the offloaded model has any."""
        return {}

    def device_kv_bytes(self) -> int:
        """Device memory of the cache between two steps."""
        tensors = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        return sum(t.nbytes for t in tensors if t is not None and t.device == self.model.device)

    def close(self) -> None:
        """Drop the cache."""
        self.cache = None


class Reference(Decoder):
    """Stock attention in plain torch ops: the truth of the gate (sdpa leaves out logit soft-capping)."""

    name = "reference"
    attention = "eager"


class HFOffloaded(Decoder):
    """Hugging Face's own offloading: the whole cache in host memory, every layer fetched for every step."""

    name = "hf-offloaded"

    def new_cache(self, rows: int, max_length: int) -> Any:
        if self.model.device.type != "cuda":
            raise Unsupported("DynamicCache(offloading=True) needs a CUDA device")
        return DynamicCache(config=self.model.config, offloading=True)


class NoAttention(Decoder):
    """The same forward with attention and cache left out: what the rest of the model costs."""

    name = "no-attention"
    attention = NO_ATTENTION

    def __init__(self, model: PreTrainedModel) -> None:
        AttentionInterface.register(NO_ATTENTION, _no_attention)
        AttentionMaskInterface.register(NO_ATTENTION, lambda *args, **kwargs: None)
        super().__init__(model)

    def new_cache(self, rows: int, max_length: int) -> Any:
        return _PassThrough(config=self.model.config)

    def start(self, input_ids: torch.Tensor, *, fill: str, max_length: int) -> None:
        super().start(input_ids[:, -1:], fill=fill, max_length=max_length)

    def device_kv_bytes(self) -> int:
        return 0


class _PassThrough(DynamicCache):
    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states


def _no_attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2), None


class Rheo(Decoder):
    """The offloaded model."""

    name = "rheo"

    def __init__(self, model: PreTrainedModel, config: RheoConfig) -> None:
        """Offload a view of `model`."""
        super().__init__(model)
        self.config = config
        offload(self.model, config, check=False)  # the gate is the check here
        self.generator = torch.Generator(self.model.device).manual_seed(2)

    def new_cache(self, rows: int, max_length: int) -> Any:
        return self.model.rheo.new_cache(max_length=max_length)

    def prefill(self, input_ids: torch.Tensor) -> None:
        self.model.rheo.prefill(self.cache, input_ids)

    def fill_random(self, rows: int, tokens: int) -> None:
        executor = self.cache.open(rows, tokens, self.model.dtype, self.model.device)
        for first in range(0, tokens, CHUNK_TOKENS):
            chunk = min(CHUNK_TOKENS, tokens - first)
            executor.begin_prefill(slice(0, rows), [first] * rows, chunk)
            start = torch.full((rows,), first, dtype=torch.int32, device=self.model.device)
            self._append_random(executor, start, chunk)
        self.cache.hf_length = tokens
        executor.warm()

    def _append_random(self, executor: Any, start: torch.Tensor, tokens: int) -> None:
        """Store one chunk in every layer as a prefill would, without its attention."""
        kv, ops, rows = executor.cache, executor.ops, len(start)
        for layer in kv.full.values():
            spec = layer.spec
            k, v = _random_kv(self.model, self.generator, (rows, spec.num_kv_heads, tokens, spec.head_dim))
            ops.append_chunk(
                k,
                v,
                start,
                kv.host_table,
                layer.k_host,
                layer.v_host,
                layer.k_pool,
                layer.v_pool,
                layer.slot_of,
            )
            if layer.summary is not None:
                ops.summarize_chunk(
                    k, start, kv.host_table, layer.k_host, layer.summary, summary_kind=layer.summary_kind
                )
        for ring in kv.sliding.values():
            spec = ring.spec
            k, v = _random_kv(self.model, self.generator, (rows, spec.num_kv_heads, tokens, spec.head_dim))
            ops.ring_append(k, v, start, ring.k_ring, ring.v_ring)

    def before_step(self, miss_rate: float) -> Callable[[], object] | None:
        return (
            (lambda: self.cache.executor.cache.drop_blocks(miss_rate, self.generator)) if miss_rate else None
        )

    def attach(self, profiler: RegionProfiler | None) -> None:
        """Let `profiler` time the parts of every step from now on; None detaches it."""
        self.cache.executor.profiler = None if profiler is None else profiler.region

    def stats(self) -> dict[str, Any]:
        return self.model.rheo.stats(self.cache).to_dict()

    def device_kv_bytes(self) -> int:
        return int(self.stats()["device_kv_bytes"])

    def close(self) -> None:
        restore(self.model)  # closes the cache and gives its host memory back
        super().close()


BASELINES: dict[str, type[Decoder]] = {c.name: c for c in (Decoder, HFOffloaded, NoAttention)}


def _kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(s.num_kv_heads, s.head_dim) for s in layer_specs(model.config)]


def _random_kv(
    model: PreTrainedModel, generator: torch.Generator, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device) for _ in range(2))
    return k, v
