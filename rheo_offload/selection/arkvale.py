"""ArkVale: the bound of q . k over a box around a page's keys, averaged over the query heads of the whole layer.

NeurIPS 2024, pku-liang/ArkVale. Its digest `cuboid-mean` is a box around the middle of the channel-wise extremes that
reaches as far as the keys do on average, which is tighter than the extremes (`cuboid-max`, Quest's box); `centroid`
is the mean key. All heads of a layer share one set of pages. Not here: attention over every resident page (the
selected ones only are attended), and the prefetch by the hidden states of earlier layers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from rheo_offload.config_checks import check_types
from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind

DIGESTS: dict[str, SummaryKind] = {"cuboid-mean": "cuboid", "cuboid-max": "minmax", "centroid": "mean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArkVale:
    """See the module."""

    name: ClassVar[str] = "arkvale"
    normalise: ClassVar[Normalise] = "softmax"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "given"

    digest: Literal["cuboid-mean", "cuboid-max", "centroid"] = "cuboid-mean"
    """What stands for a block's keys."""
    shared_by: Literal["layer", "kv_head"] = "layer"
    """Whose query heads are averaged: `layer`, and all KV heads keep the same blocks, or `kv_head`."""

    def __post_init__(self) -> None:
        check_types(self, "selection.params")

    @property
    def summary_kind(self) -> SummaryKind:
        """What `append` and `summarize_chunk` write for the digest."""
        return DIGESTS[self.digest]

    def summary_width(self, block_size: int) -> int:
        """Return the vectors of the digest: two faces of a box, or one mean."""
        return 1 if self.digest == "centroid" else 2

    def score(
        self,
        ops: Any,
        q: torch.Tensor,
        summary: torch.Tensor | None,
        *tensors: torch.Tensor | None,
        softmax_scale: float,
        block_size: int,
    ) -> None:
        """Score the closed blocks; with one set a layer, the mean over its KV heads."""
        assert summary is not None
        ops.score_minmax(
            q, summary.expand(-1, -1, 2, -1), *tensors,
            softmax_scale=softmax_scale, block_size=block_size, group_by="mean",
        )  # fmt: skip
        block_scores = tensors[-1]
        assert block_scores is not None
        if self.shared_by == "layer":
            block_scores.copy_(block_scores.mean(1, keepdim=True).expand_as(block_scores))
