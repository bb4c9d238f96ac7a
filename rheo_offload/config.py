"""The configuration: frozen dataclasses, one a group, and the strict loader.

Unknown keys, wrong types and values out of range raise `ConfigError` with the dotted path. `resolve_auto` is
the one place where an `auto` becomes a value; it returns a new configuration and logs what it decided.
"""

import copy
import dataclasses
import difflib
import logging
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from rheo_offload.config_checks import check_types, parse_bytes, require, require_size
from rheo_offload.errors import ConfigError

logger = logging.getLogger("rheo_offload")

PACKAGED = Path(__file__).parent / "configs"
LONG_CONTEXT_TOKENS = 32 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Where the KV blocks live."""

    block_size: int = 32
    """Tokens in one KV block; a power of two, 16 to 256."""
    device_memory: int | str = "auto"
    """Device pool: `auto` (grow to fill the free GPU memory), `floor` (exactly capacity_ratio x budget), or a
    cap in bytes (an integer, or for example 8GiB)."""
    capacity_ratio: float = 1.5
    """Slots per (row, KV head) as a multiple of the block budget; at least 1.0. `auto` may give more."""
    host_memory: int | str = "auto"
    """Pinned host store: `auto` (80 % of the free host memory), or bytes (an integer, or for example
    96GiB)."""

    def __post_init__(self) -> None:
        check_types(self, "cache")
        size = self.block_size
        require(
            16 <= size <= 256 and size & (size - 1) == 0,
            "cache.block_size",
            "a power of two, 16 to 256",
            size,
        )
        require_size(self.device_memory, "cache.device_memory", ("auto", "floor"))
        require_size(self.host_memory, "cache.host_memory", ("auto",))
        ratio = self.capacity_ratio
        require(math.isfinite(ratio) and ratio >= 1, "cache.capacity_ratio", "a number >= 1.0", ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """Which blocks a decode step attends to."""

    method: Literal[
        "full", "streaming", "mean_key", "infllm_v2", "quest", "moba", "arkvale", "lserve",
        "nosa", "dma", "seer_r", "nsa_select", "h2o", "tova", "snapkv", "hisa", "token_select",
        "duo", "moa", "power",
    ] = "mean_key"  # fmt: skip
    """How blocks are scored. `full` drops nothing; `streaming` keeps sink and recent blocks only."""
    token_budget: int | Literal["auto"] = "auto"
    """Tokens attended per KV head and step, rounded down to whole blocks; `auto`: 4096, or 2048 when the
    context is below 32768 tokens."""
    sink_blocks: int = 1
    """Blocks at the start that are always selected; at least 0."""
    recent_blocks: int | Literal["auto"] = "auto"
    """Blocks at the end that are always selected, the open one included; at least 1. `auto`: a quarter of the
    budget. Method `streaming` adds whatever the budget has left."""
    query_agnostic_share: float = 0.5
    """Share of the blocks left after sink and recent that goes to the hottest blocks instead of the best for
    this query; 0 to 1."""
    heat_from: Literal["scores", "attention"] = "scores"
    """What makes a block hot: the method's `scores` of all blocks, or `attention`, which puts the weights of the
    blocks that were read in their place."""
    heat_decay: float = 0.98
    """Factor on a block's heat per decode step; 0 to 1."""
    dense_layers: tuple[int, ...] = ()
    """Indices of layers that attend to everything; each at least 0."""
    remainder: Literal["none", "centroid"] = "none"
    """What stands for the blocks that are not selected: `none`, or `centroid`, their mean key and mean value."""
    budget: Literal["fixed", "threshold", "mass", "margin"] = "fixed"
    """How many blocks the scorer takes: as many as the budget leaves (`fixed`), or at most as many: those with a share
    of all scores above a limit (`threshold`), the fewest that reach a share together (`mass`), or those less than a
    limit below the best logit (`margin`)."""
    budget_limit: float = 0.0
    """The limit: above 0, for `threshold` and `mass` at most 1; 0 for `fixed`, which has none."""
    reuse_layers: dict[int, int] | str = field(default_factory=dict)
    """Layers that attend to what an earlier layer selected in the same step, each with that layer; or the file that
    `rheo trace plan` wrote. The layers have as many KV heads."""
    reuse_steps: int = 1
    """Decode steps that one selection serves; at least 1. A row selects anew when it opens a block, in any case."""
    index: Literal["auto", "flat", "two_level"] = "auto"
    """What a step ranks: all blocks (`flat`), or those of the groups that a bound of their mean keys opens
    (`two_level`); `auto`: groups where a row can hold 2048 blocks and the method allows it."""
    index_group: int = 32
    """Blocks in a group of the index; a power of two, 4 to 64."""
    index_keep: float = 0.06
    """Share of the groups that a row can hold which is opened by bound; above 0, at most 1."""
    params: dict[str, Any] = field(default_factory=dict)
    """The method's own parameters, checked by the method when a model is offloaded (docs/selectors.md)."""

    def __post_init__(self) -> None:
        check_types(self, "selection")
        budget, recent, dense = self.token_budget, self.recent_blocks, self.dense_layers
        require(
            budget == "auto" or budget >= 1, "selection.token_budget", "at least 1 token, or auto", budget
        )
        require(self.sink_blocks >= 0, "selection.sink_blocks", "at least 0", self.sink_blocks)
        require(recent == "auto" or recent >= 1, "selection.recent_blocks", "at least 1, or auto", recent)
        for name in ("query_agnostic_share", "heat_decay"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"selection.{name}", "between 0 and 1", value)
        limit, most = self.budget_limit, 1 if self.budget in ("threshold", "mass") else math.inf
        allowed = (
            f"above 0 and at most {most} for budget {self.budget}"
            if self.budget != "fixed"
            else "0 for budget fixed"
        )
        valid = 0 < limit <= most if self.budget != "fixed" else limit == 0
        require(valid, "selection.budget_limit", allowed, limit)
        require(self.reuse_steps >= 1, "selection.reuse_steps", "at least 1", self.reuse_steps)
        group, keep = self.index_group, self.index_keep
        valid = 4 <= group <= 64 and group & (group - 1) == 0
        require(valid, "selection.index_group", "a power of two, 4 to 64", group)
        require(0 < keep <= 1, "selection.index_keep", "above 0 and at most 1", keep)
        valid = all(i >= 0 for i in dense) and len(set(dense)) == len(dense)
        require(valid, "selection.dense_layers", "layer indices >= 0, each once", list(dense))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchConfig:
    """How missing blocks reach the pool."""

    overlap: bool = True
    """Load missing blocks beside the attention over the resident ones; false: first load, then attend."""

    def __post_init__(self) -> None:
        check_types(self, "prefetch")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """How the prompt is read."""

    chunk_tokens: int = 2048
    """Prompt tokens per forward pass and row; at least 1."""

    def __post_init__(self) -> None:
        check_types(self, "prefill")
        require(self.chunk_tokens >= 1, "prefill.chunk_tokens", "at least 1", self.chunk_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    """What runs the ops."""

    kernels: Literal["auto", "triton", "numba", "reference"] = "auto"
    """Home of the kernels; `auto`: Triton on a GPU, numba on a CPU."""
    graph: Literal["auto", "off"] = "auto"
    """Replay decode steps as CUDA graphs; `auto`: on a GPU, `off`: every step launches its kernels one by one."""
    fused: Literal["auto", "on", "off"] = "auto"
    """Fused norm, rotary, activation and merged projections in place of the model's own modules; `auto`: on a GPU,
    for the families that have them, `on`: refuse other families, `off`: never."""

    def __post_init__(self) -> None:
        check_types(self, "execution")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """Measurement of what the selection left out."""

    every: int = 256
    """Decode steps between two measurements of the captured attention mass, each of one row; 0 = never."""
    logits: bool = False
    """Also measure the KL of the next token to dense decoding: a second forward of the measured row's token."""
    raise_below: float = 0.0
    """Layers whose measured mass is below this get half as many blocks more, up to what the pool holds; 0 = never."""

    def __post_init__(self) -> None:
        check_types(self, "audit")
        require(self.every >= 0, "audit.every", "at least 0", self.every)
        below = self.raise_below
        require(0 <= below < 1, "audit.raise_below", "at least 0 and below 1", below)
        require(not below or self.every > 0, "audit.every", "above 0 for audit.raise_below", self.every)
        require(not self.logits or self.every > 0, "audit.every", "above 0 for audit.logits", self.every)


@dataclass(frozen=True, slots=True, kw_only=True)
class RheoConfig:
    """The whole configuration, one field a group."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from nested mappings; what is left out keeps its default.

        Raises:
            ConfigError: unknown key (the nearest known one is named), wrong type or value out of range.
        """
        _refuse_unknown(values, GROUPS, "")
        return cls(**{name: _group_from(GROUPS[name], name, group) for name, group in values.items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file, or by bare name (`default`, `quest`, ...) one of those the package brings.

        Raises:
            ConfigError: the file is missing, is not YAML, or holds what `from_dict` refuses.
        """
        file = Path(path)
        if str(path) in packaged_names():
            file = PACKAGED / f"{path}.yaml"
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            known = ", ".join(packaged_names())
            raise ConfigError(
                f"cannot read config {str(path)!r}: {error.strerror}; packaged: {known}"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, Mapping | None):
            raise ConfigError(f"config {str(path)!r} must hold groups of keys, not {values!r}")
        return cls.from_dict(values or {})

    def with_overrides(self, overrides: Iterable[str]) -> Self:
        """Return a copy with `group.key=value` texts applied in order; values are read as YAML.

        Raises:
            ConfigError: not of that form, or refused by `from_dict`.
        """
        values = self.to_dict()
        for override in overrides:
            path, equals, text = override.partition("=")
            *groups, key = path.strip().split(".")
            if not equals or not groups:
                raise ConfigError(f"override {override!r} must have the form group.key=value")
            target = values
            for group in groups:
                target = target.setdefault(group, {})
                if not isinstance(target, dict):
                    raise _unknown(path)
            try:
                target[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from error
        return self.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dictionaries that `from_dict` accepts."""
        values = dataclasses.asdict(self)
        values["selection"]["dense_layers"] = list(self.selection.dense_layers)
        return values

    def to_yaml(self) -> str:
        """Return the configuration as YAML text."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    def __post_init__(self) -> None:
        for name, group in GROUPS.items():
            value = getattr(self, name)
            require(isinstance(value, group), name, f"a {group.__name__}", value)
        if self.audit.raise_below and self.selection.budget != "fixed":
            raise ConfigError(
                "audit.raise_below raises how many blocks a layer may take, and selection.budget "
                f"{self.selection.budget!r} decides how many it takes: it could stay below for good; set "
                "audit.raise_below=0, or selection.budget=fixed"
            )
        if self.selection.token_budget != "auto":
            recent = 1 if self.selection.recent_blocks == "auto" else self.selection.recent_blocks
            _require_budget(self, self.selection.token_budget // self.cache.block_size, recent)


GROUPS: dict[str, Any] = {f.name: f.type for f in fields(RheoConfig)}


def packaged_names() -> list[str]:
    """Return the names of the configurations the package brings, sorted."""
    return sorted(file.stem for file in PACKAGED.glob("*.yaml"))


def resolve_auto(config: RheoConfig, *, context_len_tokens: int, device_type: str) -> RheoConfig:
    """Replace every `auto` that needs no measurement, and size texts by bytes; log each decision.

    `cache.host_memory` and (on a GPU) `cache.device_memory` stay `auto`: they depend on what is free.

    Args:
        config: the configuration to resolve; it is not changed.
        context_len_tokens: longest row, prompt and new tokens together, in tokens.
        device_type: `cuda` or `cpu`.

    Returns:
        A new configuration. `token_budget` and `recent_blocks` are ints, `kernels` names a home.

    Raises:
        ConfigError: the resolved budget is smaller than sink and recent blocks.
        ValueError: context below 1 token, or another device type.
    """
    if context_len_tokens < 1 or device_type not in ("cuda", "cpu"):
        raise ValueError(f"context {context_len_tokens} must be >= 1, device {device_type!r} cuda or cpu")
    cache = dataclasses.replace(
        config.cache,
        device_memory=_resolved_size(config.cache.device_memory),
        host_memory=_resolved_size(config.cache.host_memory),
    )
    selection, execution = config.selection, config.execution
    if cache.device_memory == "auto" and device_type == "cpu":
        cache = dataclasses.replace(cache, device_memory="floor")
        _log("cache.device_memory", "floor", "on the CPU a larger pool would only duplicate the host store")
    if selection.token_budget == "auto":
        budget = 4096 if context_len_tokens >= LONG_CONTEXT_TOKENS else 2048
        selection = dataclasses.replace(selection, token_budget=budget)
        _log("selection.token_budget", budget, f"context of {context_len_tokens} tokens")
    assert selection.token_budget != "auto"
    block_budget = selection.token_budget // cache.block_size
    if selection.recent_blocks == "auto":
        recent = max(1, block_budget // 4)
        selection = dataclasses.replace(selection, recent_blocks=recent)
        _log("selection.recent_blocks", recent, f"a quarter of {block_budget} blocks")
    if execution.kernels == "auto":
        execution = dataclasses.replace(execution, kernels="triton" if device_type == "cuda" else "numba")
        _log("execution.kernels", execution.kernels, f"device {device_type}")
    return dataclasses.replace(config, cache=cache, selection=selection, execution=execution)


def _log(path: str, value: int | str, reason: str) -> None:
    logger.info("%s: auto -> %s (%s)", path, value, reason)


def _resolved_size(size: int | str) -> int | str:
    return size if size in ("auto", "floor") else parse_bytes(size)


def _group_from(group: Any, name: str, values: Any) -> Any:
    if values is None:
        return group()
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} must be a group of keys, not {values!r}")
    types_of = {f.name: f.type for f in fields(group)}
    _refuse_unknown(values, types_of, f"{name}.")
    plain = copy.deepcopy(dict(values))
    for key, value in plain.items():
        if isinstance(value, list) and typing.get_origin(types_of[key]) is tuple:
            plain[key] = tuple(value)
        word = "on" if value is True else "off" if value is False else None  # YAML reads the bare words so
        if typing.get_origin(types_of[key]) is Literal and word in typing.get_args(types_of[key]):
            plain[key] = word
    return group(**plain)


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> None:
    for key in values:
        if key not in known:
            raise _unknown(f"{prefix}{key}")


def _unknown(path: str) -> ConfigError:
    known = [f"{name}.{f.name}" for name, group in GROUPS.items() for f in fields(group)]
    nearest = difflib.get_close_matches(path, known + list(GROUPS), n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; the groups are {', '.join(GROUPS)}"
    return ConfigError(f"unknown config key {path!r}{hint}")


def _require_budget(config: RheoConfig, block_budget: int, recent_blocks: int) -> None:
    sink, size = config.selection.sink_blocks, config.cache.block_size
    if block_budget < sink + recent_blocks:
        raise ConfigError(
            f"selection.token_budget of {config.selection.token_budget} tokens holds {block_budget} block(s) "
            f"of {size}; selection.sink_blocks + selection.recent_blocks need {sink} + {recent_blocks}: "
            f"it must be at least {(sink + recent_blocks) * size}"
        )
