"""Fixed patterns: which blocks a KV head attends to follows from positions alone. Nothing is scored or summarised.

A pattern enters as scores: a kept block has its number, so that the nearest blocks are kept when the budget is too
small for the pattern, every other block -inf, which the rule `scored` never takes. Sink and recent blocks are forced
as for any method.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from rheo_offload.config_checks import check_types, require
from rheo_offload.errors import ConfigError
from rheo_offload.selection.base import LayerSelectors, Normalise, ScoreKind, SummaryKind
from rheo_offload.types import LayerSpec


class Pattern:
    """What fixed patterns share; `kept` says which blocks."""

    summary_kind: ClassVar[SummaryKind] = "none"
    normalise: ClassVar[Normalise] = "none"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "given"
    ragged: ClassVar[bool] = True

    def summary_width(self, block_size: int) -> int:
        """Return 0: nothing is scored."""
        return 0

    def kept(self, block: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> torch.Tensor:
        """Return which blocks (int32 [N]) rows of `seq_lens` [B, 1, 1] tokens keep: bool [B, Hkv or 1, N]."""
        raise NotImplementedError

    def score(
        self,
        ops: Any,
        q: torch.Tensor,
        summary: torch.Tensor | None,
        host_table: torch.Tensor,
        seq_lens: torch.Tensor,
        *tensors: torch.Tensor | None,
        softmax_scale: float,
        block_size: int,
    ) -> None:
        """Write the pattern of every row."""
        block_scores = tensors[-1]
        assert block_scores is not None
        block = torch.arange(block_scores.shape[2], dtype=torch.int32, device=block_scores.device)
        kept = self.kept(block, seq_lens[:, None, None], block_size)
        block_scores.copy_(torch.where(kept, block.float(), -torch.inf).expand_as(block_scores))


class Power(Pattern):
    """PowerAttention (arXiv:2503.03588): blocks at a distance of 1, 2, 4, 8, ... from the open one, for every head.

    What a token reaches through the layers doubles with each. The paper trains models with the pattern, in blocks of
    256 tokens with one sink and five local blocks.
    """

    name: ClassVar[str] = "power"

    def kept(self, block: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> torch.Tensor:
        """Return the blocks whose distance from the open block is a power of two."""
        distance = (seq_lens - 1) // block_size - block
        return (distance > 0) & (distance & (distance - 1) == 0)


@dataclass(frozen=True, kw_only=True)
class MoA(Pattern):
    """MoA (arXiv:2406.14909, thu-nics/MoA): a window of alpha + beta * N tokens for every head, N the row's length.

    Plans are made per query head; of a group that shares a KV head the longest window counts.
    """

    name: ClassVar[str] = "moa"

    plan: str = ""
    """JSON file with `alphas` and `betas`, each [layers][query heads or KV heads], in tokens."""

    def __post_init__(self) -> None:
        check_types(self, "selection.params")

    def score(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: which layer it is must be known."""
        raise NotImplementedError("a plan has windows for every layer: ask `by_layer` first")

    def by_layer(self, specs: Sequence[LayerSpec], device: torch.device) -> LayerSelectors:
        """Read the plan.

        Raises:
            ConfigError: no file, not a plan, or one for a model of another shape.
        """
        alphas, betas = self.read_plan()
        heads = {n for s in specs for n in (s.num_kv_heads, s.num_q_heads)}
        same = len({(s.num_kv_heads, s.num_q_heads) for s in specs}) == 1
        fits = same and alphas.ndim == 2 and alphas.shape[0] == len(specs) and alphas.shape[1] in heads
        if not fits or alphas.shape != betas.shape or not (alphas + betas).isfinite().all():
            raise ConfigError(
                f"selection.params.plan: {self.plan!r} has alphas {list(alphas.shape)} and betas {list(betas.shape)}; "
                f"this model takes finite numbers for {len(specs)} layers of {' or '.join(map(str, sorted(heads)))} "
                "heads"
            )
        layers = {
            s.layer_idx: Windows(
                *(t[s.layer_idx].view(s.num_kv_heads, -1).to(device) for t in (alphas, betas))
            )
            for s in specs
        }
        return LayerSelectors(self, layers)

    def read_plan(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alphas and betas of the plan, fp32 [layers, heads] each.

        Raises:
            ConfigError: no file, or not a plan.
        """
        require(self.plan != "", "selection.params.plan", "the JSON file of a MoA plan", self.plan)
        try:
            held = json.loads(Path(self.plan).read_text(encoding="utf-8"))
            alphas, betas = (torch.tensor(held[key], dtype=torch.float32) for key in ("alphas", "betas"))
        except OSError as error:
            raise ConfigError(
                f"selection.params.plan: cannot read {self.plan!r}: {error.strerror}"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"selection.params.plan: {self.plan!r} holds no alphas and betas, numbers of [layers][heads]"
            ) from error
        return alphas, betas


class Windows(Pattern):
    """One layer of a MoA plan; alpha, beta fp32 [Hkv, heads of each], in tokens."""

    name: ClassVar[str] = "moa"

    def __init__(self, alpha: torch.Tensor, beta: torch.Tensor) -> None:
        self.alpha, self.beta = alpha, beta

    def kept(self, block: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> torch.Tensor:
        """Return the blocks that reach into the window of their head."""
        window = (self.alpha + self.beta * seq_lens).amax(-1, keepdim=True)  # [B, Hkv, 1]
        return (block + 1) * block_size > seq_lens - window
