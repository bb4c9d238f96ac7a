"""Quest: an upper bound of q . k over the block from channel-wise extremes, max over the group's query heads.

arXiv:2406.10774, mit-han-lab/quest. Quest scores each query head for itself; a cache that keeps blocks per KV head
must reduce over the group, and the maximum keeps a block that any head wants.
"""

from typing import Any, ClassVar

import torch

from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind


class Quest:
    """See the module."""

    name: ClassVar[str] = "quest"
    summary_kind: ClassVar[SummaryKind] = "minmax"
    normalise: ClassVar[Normalise] = "softmax"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "minmax"

    def summary_width(self, block_size: int) -> int:
        """Return 2: the maximum, then the minimum."""
        return 2

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score the closed blocks."""
        ops.score_minmax(q, *tensors, softmax_scale=softmax_scale, block_size=block_size)
