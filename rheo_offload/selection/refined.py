"""Token refinement: blocks are fetched whole, then only the best tokens in them are attended to.

HISA (arXiv:2603.28458) filters blocks by their mean keys and takes the top tokens of the candidates by an exact score;
TokenSelect (arXiv:2411.02886, pzs19/TokenSelect) lets all query heads of a layer vote for tokens. The exact score here
is the model's own attention weight, so both work on a model as it is.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from rheo_offload.config_checks import check_types, require
from rheo_offload.selection.base import Normalise, ScoreKind, Selector, SummaryKind
from rheo_offload.selection.infllm_v2 import InfLLMV2
from rheo_offload.selection.lserve import LServe
from rheo_offload.selection.mean_key import MeanKey
from rheo_offload.selection.moba import MoBA
from rheo_offload.selection.quest import Quest

SCORERS: dict[str, type[Selector]] = {m.name: m for m in (InfLLMV2, LServe, MeanKey, MoBA, Quest)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRule:
    """Which tokens of the selected blocks count."""

    tokens: int
    """Best tokens per KV head."""
    layer_wide: bool
    """Whether the query heads of the whole layer vote for one set (all KV heads then have the same blocks)."""
    keeps_forced: bool
    """Whether the tokens of sink and recent blocks are kept besides; else they compete like all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hisa:
    """Softmax over the candidate tokens, mean over the query heads of a KV head; nothing is forced among tokens."""

    name: ClassVar[str] = "hisa"
    query_aware: ClassVar[bool] = True

    scorer: Literal["infllm_v2", "lserve", "mean_key", "moba", "quest"] = "mean_key"
    """The method that chooses the blocks, with its default parameters."""
    tokens: int = 2048
    """Tokens attended per KV head among those of the selected blocks; at least 1."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def _blocks(self) -> Selector:
        return SCORERS[self.scorer]()

    @property
    def token_rule(self) -> TokenRule:
        """Which tokens count."""
        return TokenRule(tokens=self.tokens, layer_wide=False, keeps_forced=False)

    @property
    def summary_kind(self) -> SummaryKind:
        """As the method that chooses the blocks."""
        return self._blocks.summary_kind

    @property
    def normalise(self) -> Normalise:
        """As the method that chooses the blocks."""
        return self._blocks.normalise

    @property
    def score_kind(self) -> ScoreKind:
        """As the method that chooses the blocks."""
        return self._blocks.score_kind

    def summary_width(self, block_size: int) -> int:
        """Return the summary vectors of the method that chooses the blocks."""
        return self._blocks.summary_width(block_size)

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score the closed blocks."""
        self._blocks.score(ops, q, *tensors, softmax_scale=softmax_scale, block_size=block_size)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSelect:
    """Softmax over the tokens between sink and recent blocks, summed over all query heads of the layer."""

    name: ClassVar[str] = "token_select"
    summary_kind: ClassVar[SummaryKind] = "mean"
    normalise: ClassVar[Normalise] = "sum"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "given"

    tokens: int = 2048
    """Tokens attended besides those of sink and recent blocks; at least 1."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def token_rule(self) -> TokenRule:
        """Which tokens count."""
        return TokenRule(tokens=self.tokens, layer_wide=True, keeps_forced=True)

    def summary_width(self, block_size: int) -> int:
        """Return 1: one mean per block."""
        return 1

    def score(
        self, ops: Any, q: torch.Tensor, *tensors: torch.Tensor | None, softmax_scale: float, block_size: int
    ) -> None:
        """Score the closed blocks as `mean_key` does, then average over the KV heads: one set a layer."""
        ops.score_mean(q, *tensors, softmax_scale=softmax_scale, block_size=block_size)
        block_scores = tensors[-1]
        assert block_scores is not None
        block_scores.copy_(block_scores.mean(1, keepdim=True).expand_as(block_scores))


def _check(method: Any) -> None:
    check_types(method, "selection.params")
    require(method.tokens >= 1, "selection.params.tokens", "at least 1", method.tokens)


def token_rule_of(selector: Selector) -> TokenRule | None:
    """Return which tokens of the selected blocks count; None: all of them."""
    return selector.token_rule if isinstance(selector, Hisa | TokenSelect) else None
