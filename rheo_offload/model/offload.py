"""`offload(model, config)` attaches the runtime to a Hugging Face model in place; `restore(model)` takes it off."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from rheo_offload.cache.host_store import HostStore, host_budget
from rheo_offload.cache.kv_cache import KVCache
from rheo_offload.cache.layout import PageLayout
from rheo_offload.cache.sizing import (
    allocate_shrinking,
    capacity_floor,
    plan_memory,
    prefill_workspace_bytes,
)
from rheo_offload.config import RheoConfig, resolve_auto
from rheo_offload.device import device_free_bytes, is_cuda
from rheo_offload.errors import CacheError, ConfigError, DeviceMemoryError, UnsupportedModelError
from rheo_offload.execution.executor import STAGE_BLOCKS, STAGE_BYTES, Executor
from rheo_offload.metrics.stats import Stats
from rheo_offload.model import attention_hook
from rheo_offload.model.audit_logits import watch_logits
from rheo_offload.model.collect import collect_stats
from rheo_offload.model.fused import FusedReport, fuse_as_configured, unfuse
from rheo_offload.model.gates import load_gates
from rheo_offload.model.generation import rheo_generate
from rheo_offload.model.hf_cache import RheoCache
from rheo_offload.model.learned_heads import BiasHead, attach_heads, detach_heads, load_heads
from rheo_offload.model.prefill import prefill_rows
from rheo_offload.model.reuse_plan import read_reuse_plan
from rheo_offload.model.self_test import self_test
from rheo_offload.model.specs import (
    check_dense_layers,
    config_problems,
    layer_specs,
    max_positions,
    text_config,
)
from rheo_offload.ops import kernels_for
from rheo_offload.selection.base import LayerSelectors, Selector, method_of
from rheo_offload.selection.duo import Duo
from rheo_offload.selection.index import make_index
from rheo_offload.selection.learned_bias import LearnedBias, bias_sizes
from rheo_offload.selection.policy import (
    METHODS,
    check_budget,
    check_context,
    check_heat,
    make_policy,
    make_selector,
    mean_values,
)
from rheo_offload.selection.reuse import check_reuse
from rheo_offload.selection.seer_r import SeerR
from rheo_offload.selection.static import MoA
from rheo_offload.types import LayerSpec

logger = logging.getLogger("rheo_offload")

# Left free on the device when the pool grows to fill it: allocator fragments, cuBLAS workspaces, the logits.
DEVICE_RESERVE_BYTES = 1 << 30
# Host pages made usable (touched and pinned) at a time.
GROWTH_BYTES = 1 << 30


class RheoHandle:
    """What `model.rheo` is: the runtime attached to one model."""

    def __init__(self, model: PreTrainedModel, config: RheoConfig, original_attention: str) -> None:
        self._model = weakref.ref(model)
        self.config = config
        self.specs = layer_specs(model.config)
        self.original_attention = original_attention
        self.max_positions = max_positions(model.config)
        self.fused: FusedReport | None = None
        self.logits_watch: RemovableHandle | None = None
        self._store: HostStore | None = None
        self._caches: weakref.WeakSet[RheoCache] = weakref.WeakSet()
        self._last: RheoCache | None = None
        self.on_executor: Callable[[Executor], None] | None = None
        """Told of the executor of every cache that takes its memory."""
        check_dense_layers(config.selection.dense_layers, len(self.specs))
        selection, size = config.selection, config.cache.block_size
        method = make_selector(selection.method, selection.params, block_size=size)
        check_heat(method, selection.heat_from)
        self._index = make_index(method, selection, block_size=size)
        self._mean_values = mean_values(method, selection.remainder, block_size=size)
        self._selector = _for_layers(method, model, self.specs, selection.dense_layers, size)
        reuse = selection.reuse_layers
        self._reuse = read_reuse_plan(reuse, model.config) if isinstance(reuse, str) else reuse
        check_reuse(self._reuse, selection.reuse_steps, self._selector, self.specs, selection.dense_layers)
        if config.audit.raise_below and (self._reuse or selection.reuse_steps > 1):
            raise ConfigError(
                "audit.raise_below gives layers budgets of their own, and selections that serve several layers or "
                "steps have one; set audit.raise_below=0, or reuse nothing"
            )
        if config.audit.logits and model.get_output_embeddings() is None:
            raise ConfigError(
                f"audit.logits compares distributions of the next token, and a {type(model).__name__} has none; "
                "set audit.logits=false, or load the model with its language head"
            )
        if self._reuse and self._mean_values:
            raise ConfigError(
                "selection.remainder centroid needs the mean keys that layers of selection.reuse_layers do not keep; "
                "use selection.remainder none"
            )
        check_budget(self._selector, selection.budget, selection.query_agnostic_share)
        self._heads: dict[int, BiasHead] = {}
        if isinstance(method, LearnedBias):
            kind = text_config(model.config).model_type
            self._heads = load_heads(method.weights, model, self.specs, model_type=kind)

    @property
    def model(self) -> PreTrainedModel:
        """The model this handle is attached to."""
        model = self._model()
        if model is None:
            raise CacheError("the model is gone")
        return model

    def attach_heads(self) -> None:
        """Give the model's attention modules the learned heads of the method, where it has any."""
        if isinstance(self._selector, LearnedBias):
            ops = kernels_for(next(self.model.parameters()).device, self.config.execution.kernels)
            attach_heads(self.model, self._heads, self._selector, ops.token_bias)

    # ---- caches ----------------------------------------------------------------------------------------------------

    def new_cache(self, *, max_length: int | None = None) -> RheoCache:
        """Make an empty cache for this model; pass it as `past_key_values`.

        Args:
            max_length: longest row in tokens, prompt and new tokens; None lets the tables grow on demand.
        """
        cache = RheoCache(id(self.model), self.specs, self._make_executor, max_length=max_length)
        self._caches.add(cache)
        self._last = cache
        return cache

    def check_cache(self, cache: Any) -> RheoCache:
        """Return the cache if it is ours and of this model.

        Raises:
            CacheError: it is not.
        """
        if not isinstance(cache, RheoCache):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}; an offloaded model takes model.rheo.new_cache(), or none"
            )
        if cache.model_id != id(self.model):
            raise CacheError("this cache belongs to another model; make one with model.rheo.new_cache()")
        self._last = cache
        return cache

    def prefill(
        self,
        cache: RheoCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        warm: bool = True,
    ) -> None:
        """Read `input_ids` [B, P] into a cache in chunks of `prefill.chunk_tokens`, row by row, without padding.

        Tokens the cache already holds are skipped. Afterwards the pools hold sink, recent and hottest blocks.

        Args:
            cache: to fill.
            input_ids: the whole sequence so far, left-padded.
            attention_mask: [B, P], 0 on the left padding.
            progress: called with (tokens done, tokens in all).
            warm: load the pools at the end.
        """
        prefill_rows(
            self.model,
            self.check_cache(cache),
            input_ids,
            attention_mask,
            chunk_tokens=self.config.prefill.chunk_tokens,
            progress=progress,
            warm=warm,
        )

    def stats(self, cache: RheoCache | None = None) -> Stats:
        """Return the figures of a cache (the last one used when None). Waits for the device.

        Raises:
            CacheError: nothing has run yet.
        """
        cache = cache or self._last
        if cache is None or cache.is_empty:
            raise CacheError("nothing has run yet")
        return collect_stats(cache, self.specs)

    def close(self) -> None:
        """Close every cache of this model and give its host memory back."""
        for cache in list(self._caches):
            cache.close()
        self._last = None
        if self._store is not None:
            self._store.close()
            self._store = None

    # ---- sizing ----------------------------------------------------------------------------------------------------

    def _make_executor(self, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> Executor:
        """Size and allocate everything for a batch of `rows` rows of up to `length` tokens."""
        config = resolve_auto(self.config, context_len_tokens=length, device_type=device.type)
        size = config.cache.block_size
        max_blocks = -(-length // size)
        selector = self._selector
        block_budget = _as_int(config.selection.token_budget) // size
        policy = make_policy(
            selector=selector,
            block_budget=block_budget,
            sink_blocks=config.selection.sink_blocks,
            recent_blocks=_as_int(config.selection.recent_blocks),
            query_agnostic_share=config.selection.query_agnostic_share,
            heat_decay=config.selection.heat_decay,
            budget=config.selection.budget,
            budget_limit=config.selection.budget_limit,
        )
        check_context(selector, block_budget, max_blocks, size)
        has_bias, bias_units = bias_sizes(method_of(selector), size)
        page = PageLayout.of(self.specs, size, dtype, has_bias=has_bias)
        store = self._open_store(page, config, is_cuda(device))
        summaries = {}
        for spec in self.specs:
            unscored = spec.layer_idx in (*config.selection.dense_layers, *self._reuse)
            kept = METHODS["full"]() if unscored else selector
            values = 0 if unscored else self._mean_values
            summaries[spec.layer_idx] = (kept.summary_kind, kept.summary_width(size), values)

        scored = [i for i, (kind, *_) in summaries.items() if kind != "none"]
        grouped = dict.fromkeys(scored, self._index.group_blocks) if self._index else {}

        def capacity_for(blocks: int, reclaimed_bytes: int = 0) -> int:
            width = selector.summary_width(size) + self._mean_values
            return self._capacity(config, rows, blocks, block_budget, width, dtype, device, reclaimed_bytes)

        def allocate(capacity: int) -> KVCache:
            return KVCache(
                self.specs,
                store,
                page,
                rows=rows,
                max_blocks=max_blocks,
                capacity=capacity,
                block_size=size,
                sink_blocks=config.selection.sink_blocks,
                summaries=summaries,
                dtype=dtype,
                device=device,
                bias_units={i: bias_units for i in self._heads if i not in config.selection.dense_layers},
                group_blocks=grouped,
                grouped_from=self._index.min_blocks if self._index else 0,
            )

        floor = capacity_floor(block_budget, max_blocks, 1.0)
        cache = allocate_shrinking(allocate, capacity_for(max_blocks), floor)
        executor = Executor(
            cache,
            selector,
            policy,
            dense_layers=config.selection.dense_layers,
            heat_from=config.selection.heat_from,
            reuse_layers=self._reuse,
            reuse_steps=config.selection.reuse_steps,
            index=self._index,
            kernels=config.execution.kernels,
            overlap=config.prefetch.overlap,
            audit_every=config.audit.every,
            raise_below=config.audit.raise_below,
            capacity_for=capacity_for,
        )
        if self.on_executor is not None:
            self.on_executor(executor)
        return executor

    def _capacity(
        self,
        config: RheoConfig,
        rows: int,
        max_blocks: int,
        block_budget: int,
        summary_width: int,
        dtype: torch.dtype,
        device: torch.device,
        reclaimed_bytes: int,
    ) -> int:
        """Choose the slots per (row, KV head): the floor, a cap, or whatever fits the free device memory.

        `reclaimed_bytes` of the device are in use now and will be given back before the pool is allocated.
        """
        text = text_config(self.model.config)
        has_bias, bias_units = bias_sizes(method_of(self._selector), config.cache.block_size)
        plan = plan_memory(
            self.specs,
            rows=rows,
            max_blocks=max_blocks,
            block_size=config.cache.block_size,
            block_budget=block_budget,
            capacity_ratio=config.cache.capacity_ratio,
            summary_width=summary_width,
            stage_blocks=min(STAGE_BLOCKS, max_blocks),
            dtype=dtype,
            workspace_bytes=prefill_workspace_bytes(
                self.specs,
                chunk_tokens=config.prefill.chunk_tokens,
                hidden_size=text.hidden_size,
                intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
                itemsize=dtype.itemsize,
            ),
            has_bias=has_bias,
            bias_units=bias_units,
            group_blocks=self._index.group_blocks_of(max_blocks) if self._index else 0,
        )
        memory = config.cache.device_memory
        if memory == "floor" or plan.pool_bytes_per_capacity == 0:
            return plan.capacity_blocks
        if memory == "auto":
            other = (
                plan.device_bytes - plan.pool_bytes - plan.staging_bytes + STAGE_BYTES + DEVICE_RESERVE_BYTES
            )
            room = device_free_bytes(device) + reclaimed_bytes - other
        else:
            room = _as_int(memory)
        fits = min(max_blocks, room // plan.pool_bytes_per_capacity)
        least = capacity_floor(block_budget, max_blocks, 1.0)
        if fits < least:
            raise DeviceMemoryError(
                f"the device pool needs {least * plan.pool_bytes_per_capacity / 2**30:.2f} GiB for {rows} row(s) at a "
                f"budget of {block_budget} blocks and {max(room, 0) / 2**30:.2f} GiB is left; lower "
                "selection.token_budget or the batch, or raise cache.device_memory"
            )
        if fits < plan.capacity_blocks:
            logger.warning(
                "device pool: %d slots per KV head instead of %d (cache.capacity_ratio %.2f): memory is short",
                fits,
                plan.capacity_blocks,
                config.cache.capacity_ratio,
            )
        logger.info("device pool: %d slots per KV head of %d blocks a row can hold", fits, max_blocks)
        return int(fits)

    def _open_store(self, page: PageLayout, config: RheoConfig, pin: bool) -> HostStore | None:
        if page.page_bytes == 0:
            return None
        if self._store is None:
            budget = host_budget(config.cache.host_memory)  # type: ignore[arg-type]
            max_pages = max(2, budget // page.page_bytes)
            growth = max(1, min(GROWTH_BYTES // page.page_bytes, max_pages // 16))
            self._store = HostStore(
                page.page_bytes,
                max_pages,
                pin=pin,
                growth_pages=growth,
                tokens_per_page=config.cache.block_size,
            )
        if self._store.page_bytes != page.page_bytes:
            raise CacheError(
                "the model's dtype changed since it was offloaded; restore() and offload() it again"
            )
        return self._store


def offload(
    model: PreTrainedModel, config: RheoConfig | None = None, *, check: bool = True
) -> PreTrainedModel:
    """Attach the runtime to a model, in place.

    Afterwards `model.generate(...)` keeps its keys and values in host memory, `model.rheo` has the figures, and
    `restore(model)` undoes everything. Nothing is changed when the model is refused.

    Args:
        model: a decoder-only model of a supported family, in eval mode, on one device.
        config: defaults when None.
        check: run the self-test (two short forward passes against the model's own attention).

    Raises:
        UnsupportedModelError: with every reason at once.
        ConfigError: the configuration does not fit the model.
    """
    config = config or RheoConfig()
    problems = _model_problems(model)
    if problems:
        raise UnsupportedModelError(problems)
    original = model.config._attn_implementation
    handle = RheoHandle(model, config, original)
    attention_hook.register()
    try:
        model.set_attn_implementation(attention_hook.NAME)
        if model.config._attn_implementation != attention_hook.NAME:
            raise UnsupportedModelError(
                ["its modeling file does not go through transformers' attention interface"]
            )
        handle.fused = fuse_as_configured(model, config.execution.fused)
        if check:
            self_test(model, handle.specs)
        handle.attach_heads()
        if config.audit.logits:
            handle.logits_watch = watch_logits(model)
    except BaseException:
        unfuse(model)
        model.set_attn_implementation(original)
        raise
    model.rheo = handle
    model.generate = rheo_generate.__get__(model)  # type: ignore[method-assign]
    if all(spec.is_sliding for spec in handle.specs):
        logger.warning(
            "every layer has a sliding window: no key or value outlives it, so nothing is offloaded"
        )
    return model


def check_config(model: PreTrainedModel, config: RheoConfig) -> None:
    """Refuse what `offload` would refuse of a configuration for this model, its files included; changes nothing.

    Raises:
        ConfigError, HeadsError: as `offload`.
    """
    RheoHandle(model, config, "")


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `offload`: attention and `generate` as before, host and device memory released. Does nothing twice."""
    handle = model.__dict__.pop("rheo", None)
    if handle is None:
        return model
    model.__dict__.pop("generate", None)
    handle.close()
    if handle.logits_watch is not None:
        handle.logits_watch.remove()
    detach_heads(model)
    unfuse(model)
    model.set_attn_implementation(handle.original_attention)
    return model


def _for_layers(
    method: Selector,
    model: PreTrainedModel,
    specs: Sequence[LayerSpec],
    dense_layers: Sequence[int],
    block_size: int,
) -> Selector | LayerSelectors:
    """Return a method that has weights or classes of heads with those of each layer, any other as it is."""
    if isinstance(method, SeerR):
        gates = load_gates(method.weights, model, specs, block_size=block_size, dense_layers=dense_layers)
        return method.with_gates(gates)
    if isinstance(method, Duo | MoA):
        return method.by_layer(specs, next(model.parameters()).device)
    return method


def _model_problems(model: PreTrainedModel) -> list[str]:
    """Return every reason why this model cannot be offloaded."""
    if "rheo" in model.__dict__:
        return ["it is offloaded already; restore(model) first"]
    problems = config_problems(model.config)
    if not model._can_set_attn_implementation():
        problems.append("its modeling file does not go through transformers' attention interface")
    if model.training:
        problems.append("it is in training mode; call model.eval()")
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) != 1:
        problems.append(f"its parameters are on several devices ({', '.join(devices)})")
    elif devices[0] == "meta":
        problems.append("its parameters are on the meta device: load the weights first")
    return problems


def _as_int(value: object) -> int:
    assert isinstance(value, int), value
    return value
