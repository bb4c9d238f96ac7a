"""The ranking of NSA's selected branch, without training: attention to compressed keys, summed up over each block.

arXiv:2502.11089 (XunhaoLai/native-sparse-attention-triton, fla-org/native-sparse-attention). A compressed key stands
for a window of 32 tokens, one every 16. Softmax over the windows that are complete, summed over the query heads of a
KV head; a block gets the sum over the windows that touch it, each as often as it has strides of 16 in the block.
InfLLM-V2 takes the maximum of the same weights.

Not here: NSA's learned compressors and position embeddings, which belong to a model trained with them. The compressed
key is the mean, and of keys after the rotary embedding (NSA compresses before it and rotates afterwards). The branches
of NSA's layer (compressed, selected, window, each with its gate) are the model's own; this is the choice of blocks.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rheo_offload.selection.base import ScoreKind
from rheo_offload.selection.infllm_v2 import InfLLMV2


@dataclass(frozen=True, slots=True, kw_only=True)
class NSASelect(InfLLMV2):
    """See the module."""

    name: ClassVar[str] = "nsa_select"
    score_kind: ClassVar[ScoreKind] = "given"

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score every block that a complete window touches."""
        ops.score_windows(q, *tensors, softmax_scale=softmax_scale, block_size=block_size, pool="overlap")
