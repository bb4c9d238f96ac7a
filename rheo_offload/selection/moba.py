"""MoBA, for decoding: q . mean(K) of every block, without softmax, reduced over the group's query heads.

arXiv:2502.13189, MoonshotAI/MoBA. The gate is MoBA's: mean of the keys as attended (after RoPE), in fp32, the block
of the query always in and counted. MoBA routes each query head for itself, and its released code decodes densely; a
cache that keeps blocks per KV head must reduce over the group. The maximum keeps a block that any head wants; the
mean is the block score of Kinetics (arXiv:2506.05333, Infini-AI-Lab/Kinetics).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from rheo_offload.config_checks import check_types
from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind


@dataclass(frozen=True, slots=True, kw_only=True)
class MoBA:
    """See the module."""

    name: ClassVar[str] = "moba"
    summary_kind: ClassVar[SummaryKind] = "mean"
    normalise: ClassVar[Normalise] = "softmax"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "given"

    group_by: Literal["max", "mean"] = "max"
    """What becomes of the logits of a KV head's query heads: `max` or `mean`."""

    def __post_init__(self) -> None:
        check_types(self, "selection.params")

    def summary_width(self, block_size: int) -> int:
        """Return 1: one mean per block."""
        return 1

    def score(
        self,
        ops: Any,
        q: torch.Tensor,
        summary: torch.Tensor | None,
        *tensors: torch.Tensor | None,
        softmax_scale: float,
        block_size: int,
    ) -> None:
        """Score the closed blocks: the bound of `score_minmax` is the logit where both extremes are the mean."""
        assert summary is not None
        ops.score_minmax(
            q, summary.expand(-1, -1, 2, -1), *tensors,
            softmax_scale=softmax_scale, block_size=block_size, group_by=self.group_by,
        )  # fmt: skip
