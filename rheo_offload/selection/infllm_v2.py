"""InfLLM-V2: overlapping mean-key windows, softmax, sum over the group, max over the windows that touch a block.

Windows of 32 tokens every 16, for 64-token blocks (arXiv:2509.24663; OpenBMB/infllmv2_cuda_impl). A window is the
mean of two neighbouring 16-token sub-means, so the summary holds the sub-means and no window ever has to be stored
twice.
"""

from typing import Any, ClassVar

import torch

from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind

WINDOW_STRIDE = 16


class InfLLMV2:
    """See the module."""

    name: ClassVar[str] = "infllm_v2"
    summary_kind: ClassVar[SummaryKind] = "mean"
    normalise: ClassVar[Normalise] = "sum"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "windows"

    def summary_width(self, block_size: int) -> int:
        """Return the sub-means per block: one per stride."""
        return max(1, block_size // WINDOW_STRIDE)

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score every block that a complete window touches."""
        ops.score_windows(q, *tensors, softmax_scale=softmax_scale, block_size=block_size)
