"""What a selection method is: a summary it keeps per block, and a score it gives every block.

Policy (how many blocks, which are forced, heat) is separate and shared: `policy.py`.
A method is handed tensors and never sees the cache.
"""

from typing import Any, ClassVar, Literal, Protocol

import torch

SummaryKind = Literal["none", "mean", "minmax"]
Normalise = Literal["none", "sum", "softmax"]
ScoreKind = Literal["none", "mean", "windows", "minmax", "given"]


class Selector(Protocol):
    """One selection method. Implementations are stateless and shared by all layers."""

    name: ClassVar[str]
    summary_kind: ClassVar[SummaryKind]
    """What `append` and `summarize_chunk` write for this method."""
    normalise: ClassVar[Normalise]
    """How block scores become heat."""
    query_aware: ClassVar[bool]
    """Whether the method scores at all (False: forced blocks only)."""
    score_kind: ClassVar[ScoreKind]
    """Which scorer the op `decide` runs in its own launch; `given`: none has been built in, call `score` first."""

    def summary_width(self, block_size: int) -> int:
        """Return the number of D-wide summary vectors per block (W)."""
        ...

    def score(
        self,
        ops: Any,
        q: torch.Tensor,
        summary: torch.Tensor | None,
        host_table: torch.Tensor,
        seq_lens: torch.Tensor,
        logits: torch.Tensor | None,
        arrivals: torch.Tensor | None,
        block_scores: torch.Tensor,
        *,
        softmax_scale: float,
        block_size: int,
    ) -> None:
        """Write the score of every block of every row into `block_scores` [B, Hkv, N] fp32; higher = keep."""
        ...


def normalised(block_scores: torch.Tensor, how: Normalise) -> torch.Tensor:
    """Return block scores [..., N] as heat: non-negative, summing to one per row (zero when none is finite)."""
    finite = torch.isfinite(block_scores)
    if how == "softmax":
        return torch.softmax(block_scores, -1).nan_to_num(0.0)
    values = torch.where(finite, block_scores, 0.0)
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
