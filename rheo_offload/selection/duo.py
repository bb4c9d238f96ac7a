"""DuoAttention: some KV heads retrieve, the others stream, that is keep sink and recent blocks only.

arXiv:2410.10819, mit-han-lab/duo-attention. Which is which comes from its calibration: a number alpha for every KV head
of every layer, published as `full_attention_heads.tsv`; the quantile `sparsity` of them divides the classes. There,
heads that retrieve attend to everything; here they have a scorer (`retrieval`), or everything where the budget holds
the whole context (`full`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from rheo_offload.config_checks import check_types, require
from rheo_offload.errors import ConfigError
from rheo_offload.selection.arkvale import ArkVale
from rheo_offload.selection.base import LayerSelectors, Normalise, ScoreKind, Selector, SummaryKind
from rheo_offload.selection.infllm_v2 import InfLLMV2
from rheo_offload.selection.lserve import LServe
from rheo_offload.selection.mean_key import MeanKey
from rheo_offload.selection.moba import MoBA
from rheo_offload.selection.quest import Quest
from rheo_offload.selection.static import Pattern
from rheo_offload.types import LayerSpec

PATTERN_FILE = "full_attention_heads.tsv"


class Everything(Pattern):
    """Every block, for heads that retrieve with `full`."""

    name: ClassVar[str] = "everything"

    def kept(self, block: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> torch.Tensor:
        """Return that all are."""
        return block < seq_lens


RETRIEVAL: Mapping[str, Any] = {
    m.name: m for m in (ArkVale, InfLLMV2, LServe, MeanKey, MoBA, Quest)
} | {"full": Everything}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Duo:
    """See the module."""

    name: ClassVar[str] = "duo"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "given"
    ragged: ClassVar[bool] = True

    heads: str = ""
    """The file of alphas (tab-separated, a line a layer, a column a KV head), or the folder that holds
    `full_attention_heads.tsv`."""
    sparsity: float = 0.5
    """Share of the KV heads that stream, 0 to 1: those of the smallest alphas of the whole model."""
    retrieval: Literal["mean_key", "infllm_v2", "quest", "lserve", "moba", "arkvale", "full"] = "mean_key"
    """What the other heads do: a scorer, or `full`: attend to everything."""
    retrieval_params: dict[str, Any] = field(default_factory=dict)
    """The parameters of that scorer."""

    def __post_init__(self) -> None:
        check_types(self, "selection.params")
        require(0 <= self.sparsity <= 1, "selection.params.sparsity", "between 0 and 1", self.sparsity)
        self.scorer()

    def scorer(self) -> Selector:
        """Make the scorer of the heads that retrieve.

        Raises:
            ConfigError: it does not take those parameters.
        """
        try:
            made: Selector = RETRIEVAL[self.retrieval](**self.retrieval_params)
        except TypeError as error:
            raise ConfigError(
                f"selection.params.retrieval_params: {self.retrieval!r} does not take {self.retrieval_params}"
            ) from error
        return made

    @property
    def summary_kind(self) -> SummaryKind:
        """That of the scorer."""
        return self.scorer().summary_kind

    @property
    def normalise(self) -> Normalise:
        """That of the scorer."""
        return self.scorer().normalise

    @property
    def whole_context(self) -> bool:
        """Whether the budget must hold the whole context."""
        return self.retrieval == "full"

    def summary_width(self, block_size: int) -> int:
        """Return that of the scorer (heads that stream have summaries too, as a page serves all heads)."""
        return self.scorer().summary_width(block_size)

    def score(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: which layer it is must be known."""
        raise NotImplementedError("heads have classes in every layer: ask `by_layer` first")

    def by_layer(self, specs: Sequence[LayerSpec], device: torch.device) -> LayerSelectors:
        """Read the alphas and divide the heads.

        Raises:
            ConfigError: no file, not numbers, or of a model of another shape.
        """
        alphas = read_alphas(self.heads)
        shapes = {s.num_kv_heads for s in specs}
        wanted = (len(specs), max(shapes))
        if alphas.shape != wanted or len(shapes) > 1:
            raise ConfigError(
                f"selection.params.heads: {self.heads!r} has alphas of {alphas.shape[0]} layers x {alphas.shape[1]} KV "
                f"heads, this model has {len(specs)} x {sorted(shapes)}"
            )
        streams = torch.from_numpy(streaming_heads(alphas, self.sparsity)).to(device)
        scorer = self.scorer()
        return LayerSelectors(
            self, {s.layer_idx: DuoLayer(self, scorer, streams[s.layer_idx]) for s in specs}
        )


class DuoLayer:
    """One layer: the scorer for all heads, and `streams` (bool [Hkv]), whose scores are taken away."""

    name: ClassVar[str] = "duo"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "given"

    def __init__(self, method: Duo, scorer: Selector, streams: torch.Tensor) -> None:
        self.scorer, self.streams = scorer, streams
        self.normalise, self.summary_kind, self.summary_width = (
            scorer.normalise, scorer.summary_kind, scorer.summary_width,
        )  # fmt: skip
        self.method = method

    def score(self, ops: Any, q: torch.Tensor, *tensors: Any, **sizes: Any) -> None:
        """Score for the heads that retrieve; -inf for all blocks of the others."""
        self.scorer.score(ops, q, *tensors, **sizes)
        tensors[-1].masked_fill_(self.streams[:, None], -torch.inf)


def read_alphas(heads: str) -> np.ndarray:
    """Return a calibration's alphas [layers, Hkv], clipped to 0..1.

    Raises:
        ConfigError: no such file, or not a table of finite numbers.
    """
    require(
        heads != "", "selection.params.heads", f"a file of alphas as {PATTERN_FILE}, or its folder", heads
    )
    file = Path(heads)
    file = file / PATTERN_FILE if file.is_dir() else file
    try:
        alphas = np.loadtxt(file, dtype=float, delimiter="\t", ndmin=2)
    except OSError as error:
        raise ConfigError(f"selection.params.heads: cannot read {str(file)!r}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"selection.params.heads: {str(file)!r} is no table of numbers: {error}") from error
    require(bool(np.isfinite(alphas).all()), "selection.params.heads", "a table of finite numbers", str(file))
    return alphas.clip(0, 1)


def streaming_heads(alphas: np.ndarray, sparsity: float) -> np.ndarray:
    """Return which heads stream, bool [layers, Hkv]: those below the quantile `sparsity` of all alphas.

    Equal alphas, which the published code tells apart by noise, stream in the order of layers and heads.
    """
    count = alphas.size if sparsity >= 1 else math.ceil(sparsity * (alphas.size - 1))
    streams = np.zeros(alphas.size, dtype=bool)
    streams[np.argsort(alphas.ravel(), kind="stable")[:count]] = True
    return streams.reshape(alphas.shape)
