"""How a token budget becomes numbers of blocks, and the table of methods."""

from rheo_offload.selection.base import Selector
from rheo_offload.selection.full import Full
from rheo_offload.selection.infllm_v2 import InfLLMV2
from rheo_offload.selection.mean_key import MeanKey
from rheo_offload.selection.quest import Quest
from rheo_offload.selection.streaming import Streaming
from rheo_offload.types import Policy

METHODS: dict[str, type[Selector]] = {m.name: m for m in (Full, InfLLMV2, MeanKey, Quest, Streaming)}


def make_policy(
    *,
    selector: Selector,
    block_budget: int,
    sink_blocks: int,
    recent_blocks: int,
    query_agnostic_share: float,
    heat_decay: float,
) -> Policy:
    """Split a budget into forced, query-aware and query-agnostic blocks.

    The share is of what the forced blocks leave. A method that does not score gives that part to the recent blocks.
    """
    rest = block_budget - sink_blocks - recent_blocks
    if not selector.query_aware:
        recent_blocks, rest = recent_blocks + rest, 0
    agnostic = round(rest * query_agnostic_share)
    return Policy(
        block_budget=block_budget,
        sink_blocks=sink_blocks,
        recent_blocks=recent_blocks,
        query_blocks=rest - agnostic,
        agnostic_blocks=agnostic,
        heat_decay=heat_decay,
    )
