"""The offloaded model and its variants: the same model and kernels with another configuration."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from transformers import PreTrainedModel

from bench.decoder import CHUNK_TOKENS, Decoder, random_kv
from bench.timing import RegionProfiler
from rheo_offload.cache.group_bounds import complete_groups
from rheo_offload.config import RheoConfig
from rheo_offload.execution.executor import Executor
from rheo_offload.model.decode_loop import stepper_of
from rheo_offload.model.offload import offload, restore


class Selection(Protocol):
    """Decides which blocks a step selects in place of the configured method (`bench.selectors`)."""

    def install(self, executor: Executor) -> None:
        """Take an executor over; its cache holds the prompt."""
        ...

    def prologue(self, rows: int) -> None:
        """Launch what must run ahead of the forward, inside the step."""
        ...

    def release(self) -> None:
        """Let the cache and its memory go."""
        ...


class Rheo(Decoder):
    """The offloaded model; its steps are graphs on a GPU."""

    name = "rheo"
    overrides: ClassVar[tuple[str, ...]] = ()
    """What distinguishes a variant."""

    def __init__(
        self, model: PreTrainedModel, config: RheoConfig, *, shared: PreTrainedModel | None = None
    ) -> None:
        """Offload a view of `model`.

        Args:
            model: its weights are shared.
            config: as given; the variant's overrides come on top.
            shared: an offloaded view to use instead of a new one, host store included; it is left offloaded.
        """
        self.config = config.with_overrides(self.overrides)
        self.is_owner = shared is None
        if shared is None:
            super().__init__(model)
            offload(self.model, self.config, check=False)  # the gate is the check here
        else:
            self.model, self.cache = shared, None
        self.generator = torch.Generator(self.model.device).manual_seed(2)
        self.selection: Selection | None = None
        self.stepper: Any = None
        self.eager_because = ""
        """After `close`: what `why_eager` said last."""
        self.distinct_rows: int | None = None
        """Rows whose host pages are all different, when some are shared."""

    @property
    def executor(self) -> Executor:
        """The state of the cache, once it holds something."""
        return self.cache.executor  # type: ignore[no-any-return]

    def new_cache(self, rows: int, max_length: int) -> Any:
        self.model.rheo.config = self.config
        return self.model.rheo.new_cache(max_length=max_length)

    def start(self, input_ids: torch.Tensor, *, fill: str, max_length: int) -> None:
        super().start(input_ids, fill=fill, max_length=max_length)
        self.prepare(input_ids[:, -1:])

    def prepare(self, input_ids: torch.Tensor) -> None:
        """Get ready to decode from the tokens [B, 1], once the cache holds the prompt."""
        kv = self.executor.cache
        longest = max(self.cache.max_length or 0, max(kv.lengths))
        kv.reserve([longest] * kv.rows)  # no step stops for pages
        if self.selection is not None:
            self.selection.install(self.executor)
        self.model.rheo.config = self.config
        self.stepper = stepper_of(self.model, self.cache)
        if self.selection is not None:
            self.stepper.prologue = self.selection.prologue
        self.stepper.ids.copy_(input_ids)

    def prefill(self, input_ids: torch.Tensor) -> None:
        self.model.rheo.prefill(self.cache, input_ids)

    def fill_random(self, rows: int, tokens: int) -> None:
        self.write_random(rows, tokens)
        self.executor.warm()

    def write_random(self, rows: int, tokens: int) -> None:
        """Write random keys and values of `tokens` tokens through the cache's own append ops; warms nothing."""
        executor = self.cache.open(rows, tokens, self.model.dtype, self.model.device)
        for first in range(0, tokens, CHUNK_TOKENS):
            chunk = min(CHUNK_TOKENS, tokens - first)
            executor.begin_prefill(slice(0, rows), [first] * rows, chunk)
            start = torch.full((rows,), first, dtype=torch.int32, device=self.model.device)
            self._append_random(executor, start, chunk)
        self.cache.hf_length = tokens

    def _append_random(self, executor: Any, start: torch.Tensor, tokens: int) -> None:
        """Store one chunk in every layer as a prefill would, without its attention."""
        kv, ops, rows = executor.cache, executor.ops, len(start)
        for layer in kv.full.values():
            spec = layer.spec
            k, v = random_kv(self.model, self.generator, (rows, spec.num_kv_heads, tokens, spec.head_dim))
            ops.append_chunk(
                k, v, start, kv.host_table, layer.k_host, layer.v_host, layer.k_pool, layer.v_pool, layer.slot_of
            )  # fmt: skip
            if layer.summary is not None:
                ops.summarize_chunk(
                    k, start, kv.host_table, layer.k_host, layer.summary, summary_kind=layer.summary_kind
                )
            for row, (first, end) in enumerate(zip(start.tolist(), kv.lengths, strict=False)):
                complete_groups(layer, kv.host_table, row, first, end)
            if layer.value_summary is not None:
                ops.summarize_chunk(
                    v, start, kv.host_table, layer.v_host, layer.value_summary, summary_kind="mean"
                )
        for ring in kv.sliding.values():
            spec = ring.spec
            k, v = random_kv(self.model, self.generator, (rows, spec.num_kv_heads, tokens, spec.head_dim))
            ops.ring_append(k, v, start, ring.k_ring, ring.v_ring)

    def step(self) -> None:
        self.stepper.launch()

    def tokens(self) -> torch.Tensor:
        return self.stepper.ids.clone()  # type: ignore[no-any-return]

    def before_step(self, miss_rate: float) -> Callable[[], object] | None:
        return (lambda: self.executor.cache.drop_blocks(miss_rate, self.generator)) if miss_rate else None

    def attach(self, profiler: RegionProfiler | None) -> None:
        """Let `profiler` time the parts of every eager step from now on; None detaches it."""
        self.executor.profiler = None if profiler is None else profiler.region

    def stats(self) -> dict[str, Any]:
        return self.model.rheo.stats(self.cache).to_dict()  # type: ignore[no-any-return]

    def device_kv_bytes(self) -> int:
        return int(self.stats()["device_kv_bytes"])

    def why_eager(self) -> str:
        if self.stepper is None or self.model.device.type != "cuda" or self.config.execution.graph == "off":
            return ""
        runner = self.stepper.runner
        return runner.why_eager(len(self.stepper.ids), "greedy") or (
            "" if runner.captured else "not captured yet"
        )

    def close(self) -> None:
        self.eager_because = self.why_eager()
        self.stepper = None
        if self.selection is not None:
            self.selection.release()
        if self.is_owner:
            restore(self.model)  # closes the cache and gives its host memory back
        elif self.cache is not None:
            self.cache.close()
        super().close()


class RheoEager(Rheo):
    """The same without graphs: every kernel is launched from Python."""

    name = "rheo-eager"
    overrides = ("execution.graph=off",)


class AllResident(Rheo):
    """The same selection with a slot for every block: nothing is ever fetched."""

    name = "all-resident"
    overrides = ("cache.device_memory=floor", "cache.capacity_ratio=1.0e+9")


class FetchThenAttend(Rheo):
    """As much room as the budget, and attention only after the copy: how NOSI works, with our kernels."""

    name = "fetch-then-attend"
    overrides: ClassVar[tuple[str, ...]] = (
        "cache.device_memory=floor",
        "cache.capacity_ratio=1.0",
        "prefetch.overlap=false",
    )


class FetchThenAttendNoHeat(FetchThenAttend):
    """The same, every block chosen for the query alone."""

    name = "fetch-then-attend-no-heat"
    overrides = (*FetchThenAttend.overrides, "selection.query_agnostic_share=0")


OURS: dict[str, type[Rheo]] = {
    c.name: c for c in (Rheo, RheoEager, AllResident, FetchThenAttend, FetchThenAttendNoHeat)
}
