"""DMA (trainable dynamic mask attention): the tokens with the largest learned bias, whatever the query.

arXiv:2508.02124, SmallDoges/flash-dmattn. Published: every token whose bias is among the 2048 largest of its KV head
is attended to, and the bias is added to its logit (without the paper's exp, as the code has it). A cache of blocks
fetches blocks: here a block counts as its median token, which is DMA's own smoothing by blocks (a block is kept when
more than half of its tokens pass the threshold) with the threshold that fills the budget. Of a block that is kept all
tokens are attended to, those with a small bias with a small weight. The first and the most recent blocks are forced as
for every method here. Nothing is lost for good: a block that is not kept now stays in host memory.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind
from rheo_offload.selection.learned_bias import LearnedBias, parts_that_exist


@dataclass(frozen=True, slots=True, kw_only=True)
class DMA(LearnedBias):
    """See the module."""

    name: ClassVar[str] = "dma"
    summary_kind: ClassVar[SummaryKind] = "none"
    normalise: ClassVar[Normalise] = "none"
    query_aware: ClassVar[bool] = False
    score_kind: ClassVar[ScoreKind] = "none"
    pooling = "median"

    def summary_width(self, block_size: int) -> int:
        """Return 0: keys are not looked at."""
        return 0

    def bias_units(self, block_size: int) -> int:
        """Return every token of a block."""
        return block_size

    def score(self, *args: object, **kwargs: object) -> None:
        """Do nothing: the query has no say."""

    def pool(self, units: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Return the lower median of each whole block: more than half of its tokens are above t when it is."""
        whole = parts_that_exist(units, begin, end).view(units.shape[0], 1, *units.shape[2:]).all(-1)
        middle = (units.shape[3] - 1) // 2
        return torch.where(whole, units.sort(-1).values[..., middle], -torch.inf)
