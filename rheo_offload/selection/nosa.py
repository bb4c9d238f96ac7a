"""NOSA: InfLLM-V2's scores for the query's own blocks, a learned bias for those that are wanted whatever the query.

arXiv:2510.13602, thunlp/NOSA. Two nested top-k: blocks forced and best by query score first, then the rest of the
budget by the bias, pooled as the scores are: means of windows of 32 tokens every 16, the best window that touches the
block. Few blocks change from step to step, so few must be loaded. As published, 64 blocks of 64 tokens, of which the
first and the last 17 are forced (a window of 16, and one more by its `<=`), 15 are the query's and 31 the bias's.

The bias is added to the logits. The paper and the authors' prefill add it after the softmax scale (`logit`), their
decode kernel before (`scaled`). For a model trained without it, a fitted head with `bias: off` ranks blocks only.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind
from rheo_offload.selection.infllm_v2 import WINDOW_STRIDE, check_stride, strides_of
from rheo_offload.selection.learned_bias import LearnedBias, parts_that_exist


@dataclass(frozen=True, slots=True, kw_only=True)
class NOSA(LearnedBias):
    """See the module."""

    name: ClassVar[str] = "nosa"
    summary_kind: ClassVar[SummaryKind] = "mean"
    normalise: ClassVar[Normalise] = "none"  # what ranks beyond the query is the bias, not what scored before
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "windows"
    pooling = "windows"

    window_stride: int = WINDOW_STRIDE
    """Tokens between two windows, a power of two, 4 to 64; a window is twice as long."""

    def __post_init__(self) -> None:
        LearnedBias.__post_init__(self)
        check_stride(self.window_stride)

    def summary_width(self, block_size: int) -> int:
        """Return the sub-means per block: one per stride."""
        return strides_of(block_size, self.window_stride)

    def bias_units(self, block_size: int) -> int:
        """Return as many parts as the keys have sub-means."""
        return self.summary_width(block_size)

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score every block that a complete window touches."""
        ops.score_windows(q, *tensors, softmax_scale=softmax_scale, block_size=block_size)

    def pool(self, units: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Return the largest mean bias among the complete windows that touch each block."""
        width = units.shape[3]
        exists, parts = parts_that_exist(units, begin, end), units.flatten(2)
        windows = (parts[..., :-1] + parts[..., 1:]) / 2
        windows = torch.where(exists[..., :-1] & exists[..., 1:], windows, -torch.inf)
        # window j sits at j + 1 after padding, so block n covers W * n .. W * n + W
        padded = torch.nn.functional.pad(windows, (1, 1), value=-torch.inf)
        return padded.unfold(-1, width + 1, width).amax(-1)
