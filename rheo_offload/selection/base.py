"""What a selection method is: a summary it keeps per block, and a score it gives every block.

Policy (how many blocks, which are forced, heat) is separate and shared: `policy.py`.
A method is handed tensors and never sees the cache. A method with weights of its own is one selector a layer, held
together by `LayerSelectors`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch

from rheo_offload.config_checks import require

SummaryKind = Literal["none", "mean", "minmax", "cuboid", "own"]
Normalise = Literal["none", "sum", "softmax"]
ScoreKind = Literal["none", "mean", "windows", "minmax", "given"]


class Selector(Protocol):
    """One selection method. Implementations are stateless and shared by all layers.

    A method with parameters is a frozen dataclass; its fields are the keys of `selection.params`.
    """

    name: ClassVar[str]

    @property
    def summary_kind(self) -> SummaryKind:
        """What `append` and `summarize_chunk` write for this method; `own`: nothing, it is a `Summarizer` itself."""
        ...

    @property
    def normalise(self) -> Normalise:
        """How block scores become heat: they are shares of a whole (`sum`), logits (`softmax`), or neither."""
        ...

    query_aware: ClassVar[bool]
    """Whether the method scores at all (False: forced blocks only)."""

    @property
    def score_kind(self) -> ScoreKind:
        """Which scorer the op `decide` runs in its own launch; `given`: none has been built in, call `score` first."""
        ...

    def summary_width(self, block_size: int) -> int:
        """Return the number of D-wide summary vectors per block (W).

        Raises:
            ConfigError: the method's parameters do not go with that block size.
        """
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
        """Write the score of every block of every row into `block_scores` [B, Hkv, N] fp32; higher = keep.

        After a prompt, q holds several queries of each head, folded into its group head-major: those of a row's last
        positions.
        """
        ...


class Summarizer(Protocol):
    """A selector of summary kind `own`: it makes its summaries from a block's keys."""

    def summarize(self, keys: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Return summaries [..., Hkv, W, D] of blocks.

        Args:
            keys: [..., Hkv, C, D] after RoPE.
            blocks: [...], their logical numbers.

        Runs in every decode step on blocks that are still open too, whose result is never read.
        """
        ...


class LayerSelectors:
    """A method with weights: the selector of each layer, and what all of them have in common."""

    def __init__(self, common: Selector, layers: Mapping[int, Selector]) -> None:
        """Args: common, which is asked for name, kinds and summary width; layers, by `layer_idx`."""
        self.common, self.layers = common, dict(layers)
        self.name, self.normalise = common.name, common.normalise
        self.query_aware, self.score_kind = common.query_aware, common.score_kind
        self.summary_kind, self.summary_width = common.summary_kind, common.summary_width
        self.score = common.score  # which layer it is must be known: `for_layer` first

    def for_layer(self, layer_idx: int) -> Selector:
        """Return the selector of a layer."""
        return self.layers[layer_idx]


def method_of(selector: "Selector | LayerSelectors") -> Selector:
    """Return the method as it was configured."""
    return selector.common if isinstance(selector, LayerSelectors) else selector


def pages_of(block_size: int, page_size: int | Literal["block"]) -> int:
    """Return how many logical pages of `page_size` tokens a block holds.

    Raises:
        ConfigError: the page is not a power of two, 4 to the block size.
    """
    tokens = block_size if page_size == "block" else page_size
    valid = 4 <= tokens <= block_size and tokens & (tokens - 1) == 0
    allowed = f"block, or a power of two, 4 to cache.block_size ({block_size})"
    require(valid, "selection.params.page_size", allowed, page_size)
    return block_size // tokens


def normalised(block_scores: torch.Tensor, how: Normalise) -> torch.Tensor:
    """Return block scores [..., N] as heat: non-negative, summing to one per row (zero when none is finite)."""
    finite = torch.isfinite(block_scores)
    if how == "softmax":
        return torch.softmax(block_scores, -1).nan_to_num(0.0)
    values = torch.where(finite, block_scores, 0.0)
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
