"""Published cache-eviction policies, as block sets that heat alone ranks: no query chooses, what fades stays away.

H2O (arXiv:2306.14048, FMInference/H2O), TOVA (arXiv:2401.06104, schwartz-lab-NLP/TOVA) and SnapKV (arXiv:2404.14469,
FasterDecoding/SnapKV) drop tokens for good. Here the unit is a block of one KV head, and nothing is freed: a block
that left the set stays in host memory and is not attended to. They are baselines for comparison. Heat starts from the
attention of the prompt's last queries, measured exactly, and each of the three continues it in its own way.
"""

from dataclasses import dataclass
from typing import ClassVar

from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind


@dataclass(frozen=True, slots=True)
class AttentionHeat:
    """How a step's attention enters the heat: `heat <- decay * heat + weights of the attended blocks`.

    A method that scores adds the normalised scores of the blocks that were not attended to.
    """

    decay: float
    layer_wide: bool = False
    """Whether the weights are averaged over the KV heads of the layer, so that all of them keep the same blocks."""


class HeatRanked:
    """What the three have in common. All that sink and recent blocks leave of the budget goes to the hottest blocks."""

    name: ClassVar[str]
    summary_kind: ClassVar[SummaryKind] = "none"
    normalise: ClassVar[Normalise] = "none"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "none"
    attention_heat: ClassVar[AttentionHeat | None]
    """None: heat stays as the prompt left it."""

    def summary_width(self, block_size: int) -> int:
        """Return 0: nothing is scored."""
        return 0

    def score(self, *args: object, **kwargs: object) -> None:
        """Do nothing: heat ranks the blocks."""


class H2O(HeatRanked):
    """Heavy hitters: weights accumulate. What fell behind gets none any more, so it does not come back."""

    name: ClassVar[str] = "h2o"
    attention_heat: ClassVar[AttentionHeat | None] = AttentionHeat(decay=1.0)


class TOVA(HeatRanked):
    """The weights of the last step alone, averaged over all query heads of the layer."""

    name: ClassVar[str] = "tova"
    attention_heat: ClassVar[AttentionHeat | None] = AttentionHeat(decay=0.0, layer_wide=True)


class SnapKV(HeatRanked):
    """Chosen once, by the last queries of the prompt."""

    name: ClassVar[str] = "snapkv"
    attention_heat: ClassVar[AttentionHeat | None] = None
