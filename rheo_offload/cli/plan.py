"""`rheo plan`: does a model, context and batch fit, from the model's configuration alone."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from rheo_offload.cache.host_store import host_budget
from rheo_offload.cache.layout import BlockLayout
from rheo_offload.cache.sizing import MemoryPlan, capacity_floor, plan_memory, prefill_workspace_bytes
from rheo_offload.cli.options import add_config_options, at_least, config_from
from rheo_offload.config import RheoConfig, resolve_auto
from rheo_offload.config_checks import parse_bytes
from rheo_offload.errors import RheoError, UnsupportedModelError
from rheo_offload.execution.executor import STAGE_BLOCKS, STAGE_BYTES
from rheo_offload.model.loader import DTYPES, model_folder
from rheo_offload.model.offload import DEVICE_RESERVE_BYTES
from rheo_offload.model.reuse_plan import read_reuse_plan
from rheo_offload.model.specs import (
    check_dense_layers,
    config_problems,
    layer_specs,
    max_positions,
    text_config,
)
from rheo_offload.selection.index import make_index
from rheo_offload.selection.learned_bias import bias_sizes
from rheo_offload.selection.policy import make_selector, mean_values
from rheo_offload.types import LayerSpec

GIB = 1 << 30
SEARCH_LIMIT_TOKENS, SEARCH_LIMIT_ROWS = 1 << 24, 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one (batch, context) takes, and why it does not fit (empty: it does)."""

    batch: int
    context_len_tokens: int
    weight_bytes: int
    reserve_bytes: int
    memory: MemoryPlan
    problems: tuple[str, ...]

    @property
    def device_bytes(self) -> int:
        """Everything on the device."""
        return self.weight_bytes + self.reserve_bytes + self.memory.device_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """A model and a resolved configuration, asked about batches and contexts."""

    specs: list[LayerSpec]
    config: RheoConfig
    dtype: torch.dtype
    weight_bytes: int
    workspace_bytes: int
    device_total_bytes: int | None
    host_total_bytes: int

    def need(self, batch: int, context_len_tokens: int) -> Need:
        """Return what a batch of that many rows of that many tokens takes; the pool grows as configured."""
        config, size = self.config, self.config.cache.block_size
        selector = make_selector(config.selection.method, config.selection.params, block_size=size)
        has_bias, bias_units = bias_sizes(selector, size)
        index = make_index(selector, config.selection, block_size=size)
        budget = int(config.selection.token_budget)
        max_blocks = -(-context_len_tokens // size)
        full = [s for s in self.specs if not s.is_sliding]
        block_bytes = max(
            (s.num_kv_heads * BlockLayout(size, s.head_dim, self.dtype, has_bias).block_bytes for s in full),
            default=1,
        )

        def planned(capacity_blocks: int) -> MemoryPlan:
            return plan_memory(
                self.specs,
                rows=batch,
                max_blocks=max_blocks,
                block_size=size,
                block_budget=budget // size,
                capacity_ratio=config.cache.capacity_ratio,
                summary_width=selector.summary_width(size)
                + mean_values(selector, config.selection.remainder, block_size=size),
                stage_blocks=max(1, min(STAGE_BLOCKS, max_blocks, STAGE_BYTES // block_bytes)),
                dtype=self.dtype,
                workspace_bytes=self.workspace_bytes,
                capacity_blocks=capacity_blocks,
                has_bias=has_bias,
                bias_units=bias_units,
                group_blocks=index.group_blocks_of(max_blocks) if index else 0,
            )

        memory = planned(self._capacity(budget // size, max_blocks, planned))
        return Need(
            batch=batch,
            context_len_tokens=context_len_tokens,
            weight_bytes=self.weight_bytes,
            reserve_bytes=DEVICE_RESERVE_BYTES,
            memory=memory,
            problems=tuple(self._problems(config.cache.device_memory, memory)),
        )

    def _capacity(self, block_budget: int, max_blocks: int, planned: Callable[[int], MemoryPlan]) -> int:
        """Return the slots per (row, KV head) `cache.device_memory` gives, at least what a step needs."""
        cache, total = self.config.cache, self.device_total_bytes
        least = capacity_floor(block_budget, max_blocks, 1.0)
        base = planned(least)
        if isinstance(cache.device_memory, int):
            capacity = cache.device_memory // max(1, base.pool_bytes_per_capacity)
        elif cache.device_memory == "floor" or total is None:
            capacity = capacity_floor(block_budget, max_blocks, cache.capacity_ratio)
        else:
            slot_bytes = planned(least + 1).device_bytes - base.device_bytes
            room_bytes = total - self.weight_bytes - DEVICE_RESERVE_BYTES - base.device_bytes
            capacity = least + room_bytes // max(1, slot_bytes)
        return max(least, min(max_blocks, capacity))

    def _problems(self, device_memory: int | str, memory: MemoryPlan) -> list[str]:
        problems = []
        smaller = "lower --batch or selection.token_budget"
        device_bytes = self.weight_bytes + DEVICE_RESERVE_BYTES + memory.device_bytes
        if isinstance(device_memory, int) and memory.pool_bytes > device_memory:
            problems.append(
                f"the pool needs {gib(memory.pool_bytes)} and cache.device_memory allows "
                f"{gib(device_memory)}; raise it, or {smaller}"
            )
        if self.device_total_bytes is not None and device_bytes > self.device_total_bytes:
            if self.weight_bytes + DEVICE_RESERVE_BYTES > self.device_total_bytes:
                knob = "the weights alone do not fit; take a smaller model or dtype"
            elif memory.workspace_bytes > memory.device_kv_bytes:
                knob = "lower prefill.chunk_tokens"
            else:
                knob = smaller if memory.pool_bytes > memory.summary_bytes else "lower --batch or --context"
            problems.append(
                f"the device needs {gib(device_bytes)} and has {gib(self.device_total_bytes)}; {knob}"
            )
        if memory.host_bytes > self.host_total_bytes:
            problems.append(
                f"the host store needs {gib(memory.host_bytes)} and may take {gib(self.host_total_bytes)}; "
                "raise cache.host_memory, or lower --batch or --context"
            )
        return problems

    def largest_batch(self, context_len_tokens: int) -> int:
        """Return the most rows of that context that fit; 0 when not even one does."""
        return largest(lambda rows: not self.need(rows, context_len_tokens).problems, SEARCH_LIMIT_ROWS)

    def largest_context(self, batch: int) -> int:
        """Return the longest context in tokens that fits at that batch, in whole blocks; 0 when none does."""
        size = self.config.cache.block_size
        blocks = largest(lambda n: not self.need(batch, n * size).problems, SEARCH_LIMIT_TOKENS // size)
        return blocks * size


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest n in 1..limit for which the monotone `fits` holds, 0 when there is none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def add_parser(subparsers: Any) -> None:
    """Add the `plan` verb."""
    parser = subparsers.add_parser("plan", help="memory a model, context and batch need", description=__doc__)
    parser.add_argument(
        "--model", required=True, help="directory, hub id or config.json; weights are not read"
    )
    parser.add_argument(
        "--context", type=at_least(1), required=True, metavar="TOKENS", help="prompt + new tokens"
    )
    parser.add_argument("--batch", type=at_least(1), default=1, metavar="ROWS", help="default: 1")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: the model's own")
    parser.add_argument(
        "--device-total", metavar="SIZE", help="GPU memory, for example 80GiB (default: this GPU's)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON record")
    add_config_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit code 0 when it fits, 1 when it does not."""
    planner, hf_config = planner_for(args)
    need = planner.need(args.batch, args.context)
    positions = max_positions(hf_config)
    record = {
        "model": args.model,
        "dtype": str(planner.dtype).removeprefix("torch."),
        "fits": not need.problems,
        **{name: getattr(need, name) for name in ("batch", "context_len_tokens", "problems")},
        "token_budget": planner.config.selection.token_budget,
        "weight_bytes": need.weight_bytes,
        "reserve_bytes": need.reserve_bytes,
        **asdict(need.memory),
        "device_bytes": need.device_bytes,
        "device_total_bytes": planner.device_total_bytes,
        "host_total_bytes": planner.host_total_bytes,
        "largest_batch": planner.largest_batch(args.context),
        "largest_context_tokens": planner.largest_context(args.batch),
        "model_positions": positions,
    }
    print(json.dumps(record) if args.json else table(record))
    return 1 if need.problems else 0


def planner_for(args: argparse.Namespace) -> tuple[Planner, PreTrainedConfig]:
    """Return the planner of a command line, and the model's configuration.

    Raises:
        RheoError: the model's configuration cannot be read or served, or a size makes no sense.
    """
    # A plan is about a GPU, also where there is none.
    config = resolve_auto(config_from(args), context_len_tokens=args.context, device_type="cuda")
    try:
        total = parse_bytes(args.device_total) if args.device_total else None
    except ValueError as error:
        raise RheoError(f"--device-total: {error}") from error
    if total is None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    hf_config = load_config(args.model)
    if problems := config_problems(hf_config):
        raise UnsupportedModelError(problems)
    text = text_config(hf_config)
    dtype = (
        DTYPES[args.dtype] if args.dtype != "auto" else getattr(hf_config, "dtype", None) or torch.bfloat16
    )
    specs = layer_specs(hf_config)
    check_dense_layers(config.selection.dense_layers, len(specs))
    if isinstance(reuse := config.selection.reuse_layers, str):
        read_reuse_plan(reuse, hf_config)
    host = config.cache.host_memory
    return Planner(
        specs=specs,
        config=config,
        dtype=dtype,
        weight_bytes=num_parameters(hf_config) * dtype.itemsize,
        workspace_bytes=prefill_workspace_bytes(
            specs,
            chunk_tokens=config.prefill.chunk_tokens,
            hidden_size=text.hidden_size,
            intermediate_size=intermediate_size(text),
            itemsize=dtype.itemsize,
        ),
        device_total_bytes=total,
        host_total_bytes=host if isinstance(host, int) else host_budget("auto"),
    ), hf_config


def load_config(model: str) -> PreTrainedConfig:
    """Return the configuration of a directory, a hub id or a config.json."""
    model = model_folder(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise RheoError(
            f"cannot read the configuration of {model!r}: {' '.join(str(error).split())}"
        ) from error


def num_parameters(hf_config: PreTrainedConfig) -> int:
    """Return the parameters of the model (shared ones once), without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return sum(parameter.numel() for parameter in model.parameters())


def intermediate_size(text: PreTrainedConfig) -> int:
    """Return the widest feed-forward layer; four times the hidden size where nothing is said."""
    size = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return max(size) if isinstance(size, list | tuple) else int(size)


def table(record: dict[str, Any]) -> str:
    """Return the plan as aligned text."""
    budget, capacity, blocks = record["block_budget"], record["capacity_blocks"], record["max_blocks"]
    total = record["device_total_bytes"]
    device = gib(total) if total else "an unknown total (--device-total)"
    positions = f"{record['model_positions']:,}" if record["model_positions"] else "not stated"
    lines = [
        ("context x batch", f"{record['context_len_tokens']:,} tokens x {record['batch']}"),
        ("budget / capacity / context", f"{budget} / {capacity} / {blocks} blocks per KV head"),
        ("weights", gib(record["weight_bytes"])),
        ("device pool", gib(record["pool_bytes"])),
        ("sliding-window layers", gib(record["ring_bytes"])),
        ("block summaries", gib(record["summary_bytes"])),
        ("tables", gib(record["table_bytes"])),
        ("staging", gib(record["staging_bytes"])),
        ("prefill workspace (estimate)", gib(record["workspace_bytes"])),
        ("reserve", gib(record["reserve_bytes"])),
        ("device, all", f"{gib(record['device_bytes'])} of {device}"),
        ("a dense cache instead of ours", gib(record["dense_kv_bytes"])),
        ("host store", f"{gib(record['host_bytes'])} of {gib(record['host_total_bytes'])}"),
        ("largest batch at this context", f"{record['largest_batch']:,}"),
        ("largest context at this batch", f"{record['largest_context_tokens']:,} tokens"),
        ("the model's own positions", positions),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    verdict = (
        ["it fits"] if record["fits"] else [f"it does not fit: {problem}" for problem in record["problems"]]
    )
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in lines), *verdict])


def gib(size_bytes: int) -> str:
    """Return a size in GiB, or in MiB below one."""
    return f"{size_bytes / GIB:,.2f} GiB" if size_bytes >= GIB else f"{size_bytes / (1 << 20):,.1f} MiB"
