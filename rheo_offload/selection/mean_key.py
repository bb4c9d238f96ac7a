"""Mean key per block: softmax of q . mean(K) over the blocks, averaged over the group's query heads.

The plain block-mean scorer of the field (MoBA arXiv:2502.13189 scores with it, Kinetics arXiv:2506.05333 too), with the
softmax taken before the heads are averaged so that no head outvotes the others.
"""

from typing import Any, ClassVar

import torch

from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind


class MeanKey:
    """See the module."""

    name: ClassVar[str] = "mean_key"
    summary_kind: ClassVar[SummaryKind] = "mean"
    normalise: ClassVar[Normalise] = "sum"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "mean"

    def summary_width(self, block_size: int) -> int:
        """Return 1: one mean per block."""
        return 1

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score the closed blocks."""
        ops.score_mean(q, *tensors, softmax_scale=softmax_scale, block_size=block_size)
