"""The index of two levels: groups of blocks are opened by a bound, then only the blocks of open groups are ranked.

The channel-wise extremes of a group's mean keys bound what any of its blocks can score (Quest's bound, one level up),
and its hottest block says whether to look into it whatever the query. What a step reads of the summaries shrinks from
all of them to two vectors a group and the blocks of the open groups (ops `open_groups` and `decide`).
"""

import math
from dataclasses import dataclass

from rheo_offload.config import SelectionConfig
from rheo_offload.errors import ConfigError
from rheo_offload.selection.base import LayerSelectors, Selector, method_of
from rheo_offload.types import Policy

AUTO_BLOCKS = 2048
"""From how many blocks on `auto` opens groups: with fewer, the launch takes as long as what it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What is configured."""

    group_blocks: int
    keep: float
    """Share of the groups that a row can hold which is opened by bound."""
    min_blocks: int = 0
    """Blocks that a row must be able to hold; of fewer, all are ranked."""

    def group_blocks_of(self, max_blocks: int) -> int:
        """Return the blocks of a group in tables of that length, 0 where all blocks are ranked."""
        return self.group_blocks if max_blocks >= self.min_blocks else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How many groups a step opens, and why each of them."""

    group_blocks: int
    sink_groups: int
    recent_groups: int
    query_groups: int
    agnostic_groups: int

    @property
    def listed(self) -> int:
        """Groups that are open at most."""
        return self.sink_groups + self.recent_groups + self.query_groups + self.agnostic_groups

    @property
    def candidates(self) -> int:
        """Blocks that are ranked at most."""
        return self.listed * self.group_blocks


def groups_to_open(policy: Policy, max_blocks: int, index: Index) -> Groups:
    """Return how many groups a step opens of rows that can hold `max_blocks` blocks.

    All forced blocks lie in forced groups; the groups that are opened by bound hold at least twice the blocks that the
    query takes, those opened by heat at least twice what heat takes, all of them together the budget, with only one
    block in the newest. Never more than there are, and one: a raised budget may ask for more.
    """
    size = index.group_blocks
    groups = _ceil(max_blocks, size)
    sink = _ceil(policy.sink_blocks, size)
    recent = max(2, _ceil(policy.recent_blocks - 1, size) + 1)
    share = math.ceil(round(index.keep * groups, 6))  # 0.1 of 30 groups are 3
    query = max(share, _ceil(2 * policy.query_blocks, size))
    agnostic = max(_ceil(query, 2), _ceil(2 * policy.agnostic_blocks, size)) if policy.agnostic_blocks else 0
    missing = _ceil(policy.block_budget - 1, size) + 1 - (sink + recent + query + agnostic)
    query += max(0, missing)
    room = max(2, groups + 1 - sink - recent)
    if query + agnostic > room:
        agnostic = min(agnostic, max(1, room // 3))
        query = room - agnostic
    return Groups(
        group_blocks=size,
        sink_groups=sink,
        recent_groups=recent,
        query_groups=query,
        agnostic_groups=agnostic,
    )


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)


def make_index(
    selector: Selector | LayerSelectors, selection: SelectionConfig, *, block_size: int
) -> Index | None:
    """Return the configured index; None: every block is ranked.

    `auto` is `two_level` for long tables where it goes with the rest of the configuration, and `flat` elsewhere.

    Raises:
        ConfigError: `two_level` does not go with the method, the rule of the budget or the heat.
    """
    if selection.index == "flat":
        return None
    why = _conflict(selector, selection, block_size)
    if why is None:
        least = AUTO_BLOCKS if selection.index == "auto" else 0
        return Index(group_blocks=selection.index_group, keep=selection.index_keep, min_blocks=least)
    if selection.index == "auto":
        return None
    raise ConfigError(f"selection.index {selection.index!r}: {why}, or selection.index flat")


def _conflict(selector: Selector | LayerSelectors, selection: SelectionConfig, block_size: int) -> str | None:
    """Say why an index does not go with the rest, and what would; None: it does."""
    if selector.score_kind != "mean" or selector.summary_width(block_size) != 1:
        return f"method {selector.name!r} does not rank blocks by one mean key each; use mean_key, or hisa with it"
    if selection.budget != "fixed" or getattr(method_of(selector), "ragged", False):
        return "how many blocks a variable budget takes depends on the scores of all blocks; use selection.budget fixed"
    if selection.heat_from != "scores":
        return "heat from attention decays and grows for all blocks in every step; use selection.heat_from scores"
    return None
