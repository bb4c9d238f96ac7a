"""How a token budget becomes numbers of blocks, the table of methods, and a method from its parameters."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rheo_offload.config_checks import require
from rheo_offload.errors import ConfigError
from rheo_offload.selection.arkvale import ArkVale
from rheo_offload.selection.base import LayerSelectors, Selector, method_of
from rheo_offload.selection.dma import DMA
from rheo_offload.selection.duo import Duo, read_alphas
from rheo_offload.selection.full import Full
from rheo_offload.selection.heat_ranked import H2O, TOVA, HeatRanked, SnapKV
from rheo_offload.selection.infllm_v2 import InfLLMV2
from rheo_offload.selection.learned_bias import LearnedBias, keeps_heat
from rheo_offload.selection.lserve import LServe
from rheo_offload.selection.mean_key import MeanKey
from rheo_offload.selection.moba import MoBA
from rheo_offload.selection.nosa import NOSA
from rheo_offload.selection.nsa_select import NSASelect
from rheo_offload.selection.quest import Quest
from rheo_offload.selection.refined import Hisa, TokenSelect, token_rule_of
from rheo_offload.selection.reuse import ranks_itself
from rheo_offload.selection.seer_r import SeerR
from rheo_offload.selection.static import MoA, Power
from rheo_offload.selection.streaming import Streaming
from rheo_offload.types import Policy

METHODS: dict[str, type[Selector]] = {
    m.name: m
    for m in (
        H2O, TOVA, DMA, NOSA, ArkVale, Duo, Full, Hisa, InfLLMV2, LServe, MeanKey, MoA, MoBA, NSASelect, Power, Quest,
        SeerR, SnapKV, Streaming, TokenSelect,
    )
}  # fmt: skip


def make_selector(method: str, params: Mapping[str, Any], *, block_size: int) -> Selector:
    """Return the method with its parameters, checked against the block size too.

    Args:
        method: a key of `METHODS`.
        params: `selection.params`; what is left out keeps the method's default.
        block_size: tokens in a block.

    Raises:
        ConfigError: a parameter the method does not take (the nearest one is named), of the wrong type, out of
            range, or at odds with the block size.
    """
    cls: Any = METHODS[method]
    known = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    unknown = sorted(set(params) - set(known))
    if unknown and not known:
        raise ConfigError(f"selection.params: method {method!r} takes none, not {', '.join(unknown)}")
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        hint = f"did you mean 'selection.params.{nearest[0]}'?" if nearest else f"it takes {', '.join(known)}"
        raise ConfigError(f"method {method!r} has no 'selection.params.{unknown[0]}'; {hint}")
    selector: Selector = cls(**params)
    selector.summary_width(block_size)
    return selector


def mean_values(selector: Selector, remainder: str, *, block_size: int) -> int:
    """Return the mean values a block keeps on the device: as many as mean keys with `centroid`, 0 with `none`.

    Raises:
        ConfigError: the method keeps no mean keys that could stand for what it leaves out, or leaves nothing out.
    """
    if remainder == "none":
        return 0
    if token_rule_of(selector) is not None:
        raise ConfigError(
            f"selection.remainder {remainder!r} stands for whole blocks, and method {selector.name!r} leaves out "
            "single tokens; use selection.remainder none"
        )
    if isinstance(selector, LearnedBias):
        raise ConfigError(
            f"selection.remainder {remainder!r} would leave out the bias that method {selector.name!r} adds to the "
            "logits; use selection.remainder none"
        )
    if selector.summary_kind != "mean":
        raise ConfigError(
            f"selection.remainder {remainder!r} needs the mean keys of the blocks, which method {selector.name!r} does "
            "not keep; use mean_key, moba, infllm_v2 or arkvale with digest centroid, or selection.remainder none"
        )
    return selector.summary_width(block_size)


def check_heat(selector: Selector, heat_from: str) -> None:
    """Refuse heat from attention for a method that has no use for it, a rule of its own, or attends to tokens.

    Raises:
        ConfigError: why not.
    """
    if heat_from == "attention" and token_rule_of(selector) is not None:
        raise ConfigError(
            f"selection.heat_from: method {selector.name!r} attends to single tokens, which say nothing of a block; "
            "use scores"
        )
    if heat_from == "attention" and isinstance(selector, HeatRanked):
        raise ConfigError(
            f"selection.heat_from: method {selector.name!r} takes its heat from attention by a rule of its own; use "
            "scores"
        )
    fixed = getattr(selector, "ragged", False) and selector.normalise == "none"
    if heat_from == "attention" and (fixed or not selector.query_aware or isinstance(selector, LearnedBias)):
        raise ConfigError(
            f"selection.heat_from: method {selector.name!r} keeps no heat that attention could feed; use scores"
        )


def check_files(selector: Selector) -> None:
    """Refuse a method whose own file is missing or unreadable, before there is a model to hold it against.

    Raises:
        ConfigError: which parameter, and what it must be.
    """
    if isinstance(selector, Duo):
        read_alphas(selector.heads)
    elif isinstance(selector, MoA):
        selector.read_plan()
    elif isinstance(selector, SeerR):
        allowed = "a safetensors file with the gates of the model (docs/learned.md)"
        require(selector.weights is not None, "selection.params.weights", allowed, selector.weights)
    elif isinstance(selector, LearnedBias):  # without a file the model may have them
        exists = selector.weights is None or Path(selector.weights).exists()
        require(exists, "selection.params.weights", "a file or directory that exists", selector.weights)


def check_budget(selector: Selector | LayerSelectors, budget: str, query_agnostic_share: float) -> None:
    """Refuse a rule of the budget that means nothing for the method's scores.

    Raises:
        ConfigError: with the reason.
    """
    scores = selector.normalise if selector.query_aware else "none"
    wanted = "softmax" if budget == "margin" else "sum"
    ranked = ranks_itself(method_of(selector))
    if budget == "fixed" or not ranked and scores == wanted and query_agnostic_share < 1:
        return
    why = {
        "none": "it does not score blocks",
        "softmax": "its scores are logits, of which shares mean nothing; take margin",
        "sum": "its scores are shares of a whole, a margin is one of logits; take threshold or mass",
    }[scores]
    if ranked:
        why = "it ranks blocks, or tokens of blocks, by more than the scores that a rule is about"
    elif scores == wanted:
        why = "selection.query_agnostic_share of 1 leaves it nothing to choose"
    raise ConfigError(f"selection.budget {budget!r} does not go with method {selector.name!r}: {why}")


def make_policy(
    *,
    selector: Selector | LayerSelectors,
    block_budget: int,
    sink_blocks: int,
    recent_blocks: int,
    query_agnostic_share: float,
    heat_decay: float,
    budget: str = "fixed",
    budget_limit: float = 0.0,
) -> Policy:
    """Split a budget into forced, query-aware and query-agnostic blocks.

    The share is of what the forced blocks leave. A method whose query does not choose gives all of it to the blocks
    that rank highest without one (by heat or by a learned bias), and without such a rank to the recent blocks; one
    whose scores are not heat (a fixed pattern) gives the agnostic part to the scores.

    Raises:
        ConfigError: a rule of the budget that means nothing here.
    """
    check_budget(selector, budget, query_agnostic_share)
    rest = block_budget - sink_blocks - recent_blocks
    method = method_of(selector)
    if not keeps_heat(method):
        recent_blocks, rest = recent_blocks + rest, 0
    by_query = selector.query_aware and not isinstance(selector, HeatRanked)
    agnostic = round(rest * query_agnostic_share) if by_query else rest
    if getattr(method, "ragged", False) and selector.normalise == "none":
        agnostic = 0
    if budget == "fixed" and getattr(method, "ragged", False):
        budget = "scored"
    if budget != "fixed" and rest - agnostic < 1:
        raise ConfigError(
            f"selection.token_budget of {block_budget} blocks leaves method {selector.name!r} none to choose beyond "
            f"{sink_blocks} sink, {recent_blocks} recent and {agnostic} query-agnostic block(s); raise it"
        )
    return Policy(
        block_budget=block_budget,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        query_blocks=rest - agnostic,
        agnostic_blocks=agnostic,
        heat_decay=heat_decay,
        rule=budget,
        limit=budget_limit,
    )


def widened(policy: Policy, block_budget: int) -> Policy:
    """Return a policy with a larger budget: what is added goes to scored blocks, in the shares they had.

    Where no blocks are scored it goes to the recent ones.
    """
    scored = policy.query_blocks + policy.agnostic_blocks
    more = block_budget - policy.block_budget
    if not scored:
        return dataclasses.replace(
            policy, block_budget=block_budget, recent_blocks=policy.recent_blocks + more
        )
    agnostic = round((scored + more) * policy.agnostic_blocks / scored)
    return dataclasses.replace(
        policy, block_budget=block_budget, query_blocks=scored + more - agnostic, agnostic_blocks=agnostic
    )


def check_context(
    selector: Selector | LayerSelectors, block_budget: int, blocks: int, block_size: int
) -> None:
    """Refuse rows that a method needs whole and the budget does not hold.

    Raises:
        ConfigError: with the budget that would.
    """
    if blocks > block_budget and getattr(method_of(selector), "whole_context", False):
        raise ConfigError(
            f"selection.params.retrieval 'full' attends to everything, and selection.token_budget holds {block_budget} "
            f"of the {blocks} blocks of a row: raise it to {blocks * block_size}, or give those heads a scorer"
        )
