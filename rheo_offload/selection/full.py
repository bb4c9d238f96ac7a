"""Every block, every step: exact dense attention through the offloading data path. The baseline of the others."""

from typing import ClassVar

from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind


class Full:
    """See the module."""

    name: ClassVar[str] = "full"
    summary_kind: ClassVar[SummaryKind] = "none"
    normalise: ClassVar[Normalise] = "none"
    query_aware: ClassVar[bool] = False
    score_kind: ClassVar[ScoreKind] = "none"

    def summary_width(self, block_size: int) -> int:
        """Return 0: nothing is scored."""
        return 0

    def score(self, *args: object, **kwargs: object) -> None:
        """Do nothing: every block is selected."""
