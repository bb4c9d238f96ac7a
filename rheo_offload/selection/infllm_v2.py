"""InfLLM-V2: overlapping mean-key windows, softmax, sum over the group, max over the windows that touch a block.

Windows of 32 tokens every 16, for 64-token blocks (arXiv:2509.24663; OpenBMB/infllmv2_cuda_impl). A window is the
mean of two neighbouring 16-token sub-means, so the summary holds the sub-means and no window ever has to be stored
twice.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rheo_offload.config_checks import check_types, require
from rheo_offload.selection.base import Normalise, ScoreKind, SummaryKind

WINDOW_STRIDE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class InfLLMV2:
    """See the module."""

    name: ClassVar[str] = "infllm_v2"
    summary_kind: ClassVar[SummaryKind] = "mean"
    normalise: ClassVar[Normalise] = "sum"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "windows"

    window_stride: int = WINDOW_STRIDE
    """Tokens between two windows, a power of two, 4 to 64; a window is twice as long."""

    def __post_init__(self) -> None:
        check_types(self, "selection.params")
        check_stride(self.window_stride)

    def summary_width(self, block_size: int) -> int:
        """Return the sub-means per block: one per stride."""
        return strides_of(block_size, self.window_stride)

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score every block that a complete window touches."""
        ops.score_windows(q, *tensors, softmax_scale=softmax_scale, block_size=block_size)


def check_stride(window_stride: int) -> None:
    """Refuse a stride that no window can have.

    Raises:
        ConfigError: it is not a power of two, 4 to 64.
    """
    valid = 4 <= window_stride <= 64 and window_stride & (window_stride - 1) == 0
    require(valid, "selection.params.window_stride", "a power of two, 4 to 64", window_stride)


def strides_of(block_size: int, window_stride: int) -> int:
    """Return the parts of a block whose means windows are made of; a block below the stride is one part."""
    return max(1, block_size // window_stride)
