"""What methods with a learned bias per token share: the bias itself, and a rank of blocks that asks no query.

A small head of the model turns a token's values into one number per KV head (`model/learned_heads.py`). It is stored
behind the keys and values of its block and moves with them. Two things come of it, each of which can be had alone:

- it is added to the logits (`bias`), as the model was trained;
- pooled over a block it ranks blocks in place of the heat: it says what will be wanted whatever the query.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rheo_offload.config_checks import check_types
from rheo_offload.selection.base import LayerSelectors, Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedBias(ABC):
    """Parameters and pooling of such a method."""

    pooling: ClassVar[Literal["windows", "median"]]
    """How the op `rank_bias` ranks a block in a decode step; `pool` ranks those of a prompt."""

    weights: str | None = None
    """Side file of the heads, or the directory of a checkpoint that has them; left out: the model's own."""
    bias: bool = True
    """Whether the bias is added to the logits; off: it only ranks blocks, and the model attends as it is."""
    bias_scale: Literal["logit", "scaled"] = "logit"
    """What it is added to: `logit`: exp(q.k * scale + bias); `scaled`: exp((q.k + bias) * scale)."""

    def __post_init__(self) -> None:
        check_types(self, "selection.params")

    def logit_factor(self, softmax_scale: float) -> float | None:
        """Return the factor on the bias where it is added to the scaled logit; None: it is not added."""
        if not self.bias:
            return None
        return softmax_scale if self.bias_scale == "scaled" else 1.0

    @abstractmethod
    def bias_units(self, block_size: int) -> int:
        """Return the parts of a block (W) whose mean bias is kept."""

    @abstractmethod
    def pool(self, units: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Rank blocks by their bias.

        Args:
            units: fp32 [B, Hkv, N, W], mean bias of the parts of neighbouring blocks.
            begin, end: int [B, 1]: the parts that exist, counted from the first one given; others may hold anything.

        Returns:
            [B, Hkv, N], higher = keep; -inf where there is nothing to tell yet.
        """


def parts_that_exist(units: torch.Tensor, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Return which of the parts [B, Hkv, N, W] lie in `[begin, end)`, as bool [B, 1, N * W]."""
    part = torch.arange(units.shape[2] * units.shape[3], device=units.device)
    return ((part >= begin) & (part < end))[:, None]


def keeps_heat(selector: Selector | LayerSelectors) -> bool:
    """Whether a score per block that asks no query is kept for the method: decayed scores, or the pooled bias."""
    return selector.query_aware or isinstance(selector, LearnedBias)


def bias_sizes(selector: Selector | LayerSelectors, block_size: int) -> tuple[bool, int]:
    """Return whether blocks carry a bias per token, and how many parts of a block have a mean on the device."""
    return (True, selector.bias_units(block_size)) if isinstance(selector, LearnedBias) else (False, 0)
