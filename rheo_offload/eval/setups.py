"""What is compared: every method at every budget, equal in all but the method, beside the dense model.

A model that brings its own configuration (`rheo.yaml`) is served by it under the name of its method; the other methods
get its geometry: its blocks, and as many of them at the start and the end.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rheo_offload.config import RheoConfig, packaged_names
from rheo_offload.config_checks import require
from rheo_offload.errors import RheoError
from rheo_offload.selection.learned_bias import LearnedBias
from rheo_offload.selection.policy import METHODS, check_files, make_selector

__all__ = ["DENSE", "Setup", "nearest", "setups_of"]

DENSE = "dense"
PACKAGED_AS = {"mean_key": "default", "full": "dense"}
"""Methods whose packaged configuration has another name than the method."""
EQUAL = ("cache.capacity_ratio=1.5", "cache.device_memory=floor", "audit.every=8")
EVERYTHING = (
    "selection.budget=fixed",
    "selection.budget_limit=0",
    "cache.device_memory=floor",
    "audit.every=0",
    "audit.logits=false",
    "audit.raise_below=0",
)
"""What makes a budget for all positions attend to all of them, and nothing be measured beside."""
POSITIONS = 1 << 17
"""Of a model that does not say how many it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A method at a budget; `config` is None for the stock model."""

    method: str
    token_budget: int | None = None
    config: RheoConfig | None = None


def nearest(kind: str, name: str, known: Iterable[str]) -> RheoError:
    """Return the error for an unknown name, with the nearest known one."""
    names = sorted(known)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {found[0]!r}?" if found else f"known: {', '.join(names)}"
    return RheoError(f"unknown {kind} {name!r}; {hint}")


def setups_of(
    methods: Sequence[str],
    budgets: Sequence[int],
    overrides: Sequence[str] = (),
    *,
    own: RheoConfig | None = None,
    positions: int | None = None,
) -> list[Setup]:
    """Return the dense model and every method at every budget.

    Args:
        methods: `METHOD` or `LABEL=METHOD`; METHOD is a selection method, a packaged configuration or a YAML file.
        budgets: tokens attended per KV head and step.
        overrides: `group.key=value` for all methods, `LABEL:group.key=value` for one.
        own: the configuration that the model brings.
        positions: of the model, None where it does not say.

    Raises:
        RheoError: an unknown method, a label twice, or an override for a label that is not there.
        ConfigError: a configuration that is refused, for example a budget below the forced blocks, or a method's file
            that is not there.
    """
    sources = {}
    for entry in methods:
        label, _, name = entry.rpartition("=")
        label = label or name
        if label in sources or (label == DENSE and name != DENSE):
            raise RheoError(f"the method {label!r} is named twice; tell them apart as LABEL={name}")
        sources[label] = _source_of(name)
    special: dict[str, list[str]] = {label: [] for label in sources}
    shared = []
    for override in overrides:
        label, colon, text = override.partition("=")[0].partition(":")
        if not colon:
            shared.append(override)
        elif label in special:
            special[label].append(override[len(label) + 1 :])
        else:
            raise nearest("method", label, special)
    setups = [_dense(own, positions or POSITIONS, shared)]
    for label, source in sources.items():
        if label == DENSE:
            continue
        base, geometry = _base(source, own)
        for budget in budgets:
            equal = [f"selection.token_budget={budget}", *geometry, *EQUAL]
            config = _checked(base.with_overrides([*equal, *shared, *special[label]]))
            setups.append(Setup(method=label, token_budget=budget, config=config))
            if config.selection.method == "full":
                break  # it attends to everything at any budget
    return setups


def _source_of(name: str) -> str:
    if name == DENSE:
        return DENSE
    if name in METHODS or name in packaged_names():
        return PACKAGED_AS.get(name, name)
    if _is_file(name):
        return name
    raise nearest("method", name, [*METHODS, *packaged_names(), DENSE])


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _base(source: str, own: RheoConfig | None) -> tuple[RheoConfig, list[str]]:
    """Return what a method starts from, and the geometry it gets beside its budget."""
    if own is not None and source == PACKAGED_AS.get(own.selection.method, own.selection.method):
        return own, []
    config = RheoConfig.from_yaml(source)
    if own is None or _is_file(source):
        return config, ["selection.recent_blocks=auto"]
    return config, [
        f"cache.block_size={own.cache.block_size}",
        f"selection.sink_blocks={own.selection.sink_blocks}",
        f"selection.recent_blocks={own.selection.recent_blocks}",
    ]


def _checked(config: RheoConfig) -> RheoConfig:
    selection = config.selection
    check_files(make_selector(selection.method, selection.params, block_size=config.cache.block_size))
    plan = selection.reuse_layers
    if isinstance(plan, str):
        require(
            Path(plan).is_file(), "selection.reuse_layers", "pairs of layers, or a file that exists", plan
        )
    return config


def _dense(own: RheoConfig | None, positions: int, shared: Sequence[str]) -> Setup:
    """Return the stock model, or one with a learned bias, which stock attention lacks, with a budget for everything.

    Of the overrides for all methods it takes what does not say which blocks are chosen: the bias must stay.
    """
    if own is None:
        return Setup(method=DENSE)
    selection = own.selection
    selector = make_selector(selection.method, selection.params, block_size=own.cache.block_size)
    if not (isinstance(selector, LearnedBias) and selector.bias):
        return Setup(method=DENSE)
    config = own.with_overrides([text for text in shared if not text.startswith(("selection.", "audit."))])
    budget = positions + config.cache.block_size
    config = config.with_overrides([f"selection.token_budget={budget}", *EVERYTHING])
    return Setup(method=DENSE, config=_checked(config))
