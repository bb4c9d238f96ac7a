"""Quest: an upper bound of q . k over the block from channel-wise extremes, max over the group's query heads.

arXiv:2406.10774, mit-han-lab/quest. Quest scores each query head for itself; a cache that keeps blocks per KV head
must reduce over the group, and the maximum keeps a block that any head wants.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from rheo_offload.config_checks import check_types
from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind, pages_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest:
    """See the module."""

    name: ClassVar[str] = "quest"
    summary_kind: ClassVar[SummaryKind] = "minmax"
    normalise: ClassVar[Normalise] = "softmax"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "minmax"

    page_size: int | Literal["block"] = "block"
    """Tokens whose extremes are kept together, a power of two, 4 to the block size; `block`: the whole block. A
    block counts as its best page."""

    def __post_init__(self) -> None:
        check_types(self, "selection.params")

    def summary_width(self, block_size: int) -> int:
        """Return 2 for each page: the maximum, then the minimum."""
        return 2 * pages_of(block_size, self.page_size)

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score the closed blocks."""
        ops.score_minmax(q, *tensors, softmax_scale=softmax_scale, block_size=block_size)
