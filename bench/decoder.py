"""What is measured, behind one interface: a model, its cache and every row's next token. Here: stock Hugging Face.

Every subject has its own module tree over the same weights (`shapes.view`), so that they can take turns.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from bench.shapes import view
from rheo_offload.model.fused import fuse_as_configured
from rheo_offload.model.specs import layer_specs

CHUNK_TOKENS = 2048
NO_ATTENTION = "bench_no_attention"


class Unsupported(Exception):
    """The subject cannot run here; the message says why."""


class Decoder:
    """A model, its cache and every row's next token; the base class is stock: sdpa and DynamicCache."""

    name: ClassVar[str] = "stock"
    attention: ClassVar[str] = "sdpa"
    fused: ClassVar[str] = "off"
    """As `execution.fused`: whether the model's norms, rotary, activation and projections are the fused ones."""
    note = ""
    """What a row should say about the subject beyond its name."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a view of `model`; its weights are shared, its attention is this subject's own."""
        self.model = view(model, self.attention)
        fuse_as_configured(self.model, self.fused)
        self.cache: Any = None
        self.ids: torch.Tensor

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
        for layer_idx, (heads, dim) in enumerate(kv_shapes(self.model)):
            self.cache.update(*random_kv(self.model, generator, (rows, heads, tokens, dim)), layer_idx)

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

    def tokens(self) -> torch.Tensor:
        """Return the last token of every row [B, 1]."""
        return self.ids.clone()

    def why_eager(self) -> str:
        """Return why the step is no graph although it should be one; empty when all is well."""
        return ""

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


def kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return (KV heads, head dim) of every layer."""
    return [(s.num_kv_heads, s.head_dim) for s in layer_specs(model.config)]


def random_kv(
    model: PreTrainedModel, generator: torch.Generator, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw keys and values in the model's dtype, on its device."""
    k, v = (torch.randn(shape, generator=generator, dtype=model.dtype, device=model.device) for _ in range(2))
    return k, v
