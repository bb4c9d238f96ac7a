"""StreamingLLM's set: the first blocks and the most recent ones, whatever the query (arXiv:2309.17453).

Positions stay original (StreamingLLM renumbers them inside its cache), because this runtime keeps every key and
may need it again.
"""

from typing import ClassVar

from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind


class Streaming:
    """See the module."""

    name: ClassVar[str] = "streaming"
    summary_kind: ClassVar[SummaryKind] = "none"
    normalise: ClassVar[Normalise] = "none"
    query_aware: ClassVar[bool] = False
    score_kind: ClassVar[ScoreKind] = "none"

    def summary_width(self, block_size: int) -> int:
        """Return 0: nothing is scored."""
        return 0

    def score(self, *args: object, **kwargs: object) -> None:
        """Do nothing: every selected block is forced."""
