"""SeerAttention-R's decode gate: a small learned query and key per KV head that predict the attention of a block.

arXiv:2506.08889, microsoft/SeerAttention. The gate sees queries and keys before the rotation (after the model's own
norm of them, if it has one):

    gate query    sum over the group of q W_q[head], normed, rotated to the query's position     one a KV head
    gate key      (max, min, mean of the block's keys) W_k, normed, rotated to the block's start  one a block
    block score   softmax over the closed blocks of (gate query . gate key) / sqrt(width)

The released decoding rotates the gate key of a block that closes while decoding to the block's last position, and
those of the prompt to its first; here it is the first for both, which is what the gates were trained with. Only
closed blocks compete (there the open one does, with a gate key of zeros); the open one is always among the recent.
The budget is the shared one of `selection.token_budget`; its threshold is not part of this method.

The norms and the file they come in are optional; `model/gates.py` reads and checks it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rheo_offload.config_checks import check_types, require
from rheo_offload.errors import ConfigError
from rheo_offload.selection.base import LayerSelectors, Normalise, ScoreKind, SummaryKind
from rheo_offload.selection.rope import Rope

NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class SeerR:
    """What the configuration says of the method; `with_gates` makes it ready to score."""

    name: ClassVar[str] = "seer_r"
    summary_kind: ClassVar[SummaryKind] = "own"
    normalise: ClassVar[Normalise] = "sum"
    query_aware: ClassVar[bool] = True
    score_kind: ClassVar[ScoreKind] = "given"

    weights: str | None = None
    """Safetensors file with the gates of the model's full-attention layers, or a directory of such files."""

    def __post_init__(self) -> None:
        check_types(self, "selection.params")
        exists = self.weights is None or Path(self.weights).exists()
        require(exists, "selection.params.weights", "a file or directory that exists", self.weights)

    def summary_width(self, block_size: int) -> int:
        """Return 1: a gate key is as wide as a key."""
        return 1

    def score(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the gates are not loaded.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("method 'seer_r' scores with the gates of a model: `with_gates` comes first")

    def with_gates(self, gates: Mapping[int, "SeerGate"]) -> LayerSelectors:
        """Return the method with the gate of every full-attention layer, by `layer_idx`."""
        return LayerSelectors(self, gates)


class SeerGate:
    """The gate of one layer. It computes in the dtype of its weights, rotations and norms in fp32."""

    name: ClassVar[str] = SeerR.name
    summary_kind: ClassVar[SummaryKind] = SeerR.summary_kind
    normalise: ClassVar[Normalise] = SeerR.normalise
    query_aware: ClassVar[bool] = SeerR.query_aware
    score_kind: ClassVar[ScoreKind] = SeerR.score_kind

    def __init__(
        self,
        w_query: Tensor,
        w_key: Tensor,
        rope: Rope,
        *,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
    ) -> None:
        """Take the weights as they are; `w_query` [Hkv, G, D, D], `w_key` [Hkv, 3 * D, D], norms [D] or None.

        `w_key` takes the channel-wise maxima first, then minima and means.
        """
        self.w_query, self.w_key, self.rope = w_query, w_key, rope
        self.query_norm, self.key_norm = query_norm, key_norm

    def summary_width(self, block_size: int) -> int:
        """Return 1."""
        return 1

    def gate_queries(self, q: Tensor, seq_lens: Tensor) -> Tensor:
        """Fold q [B, Hq * T, D] after RoPE into gate queries [B, Hkv, T, D] in q's dtype.

        T is 1 in a decode step. More queries of each head may follow one another (head-major); they are those at
        the last T positions of a row of `seq_lens` [B] tokens.
        """
        heads, group = self.w_query.shape[:2]
        x = q.unflatten(1, (heads, group, -1))  # [B, Hkv, G, T, D]
        times = x.shape[3]
        positions = seq_lens[:, None] - times + torch.arange(times, device=q.device)
        x = self.rope.undo(_wide(x), positions[:, None, None])
        return self.query_of(x, positions[:, None]).to(q.dtype)

    def query_of(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return gate queries fp32 [B, Hkv, T, D] of x [B, Hkv, G, T, D] before RoPE, at `positions` [B, 1, T]."""
        x = torch.einsum("bhgtd,hgde->bhte", x.to(self.w_query.dtype), self.w_query)
        return self.rope.apply(_normed(x, self.query_norm), positions)

    def summarize(self, keys: Tensor, blocks: Tensor) -> Tensor:
        """Return gate keys [..., Hkv, 1, D] of keys [..., Hkv, C, D] after RoPE, in their dtype; see `Summarizer`."""
        size = keys.shape[-2]
        starts = blocks[..., None] * size
        positions = starts + torch.arange(size, device=keys.device)  # [..., C]
        x = self.rope.undo(_wide(keys), positions[..., None, :])
        return self.key_of(pool_keys(x), starts).to(keys.dtype)[..., None, :]

    def key_of(self, pooled: Tensor, starts: Tensor) -> Tensor:
        """Return gate keys fp32 [..., Hkv, D] of pooled keys [..., Hkv, 3 * D]; blocks begin at `starts` [..., 1]."""
        x = torch.einsum("...hi,hio->...ho", pooled.to(self.w_key.dtype), self.w_key)
        return self.rope.apply(_normed(x, self.key_norm), starts)

    def score(
        self,
        ops: Any,
        q: Tensor,
        summary: Tensor | None,
        host_table: Tensor,
        seq_lens: Tensor,
        logits: Tensor | None,
        arrivals: Tensor | None,
        block_scores: Tensor,
        *,
        softmax_scale: float,
        block_size: int,
    ) -> None:
        """Score the closed blocks: `score_mean` with one query a KV head; the model's softmax scale has no part."""
        gate = self.gate_queries(q, seq_lens).flatten(1, 2)
        scratch = None if logits is None else logits[:, : gate.shape[1]]
        ops.score_mean(
            gate, summary, host_table, seq_lens, scratch, arrivals, block_scores,
            softmax_scale=gate.shape[-1] ** -0.5, block_size=block_size,
        )  # fmt: skip


def pool_keys(keys: Tensor) -> Tensor:
    """Pool keys [..., C, D] from before RoPE to [..., 3 * D]: channel-wise maxima, minima, means."""
    return torch.cat((keys.amax(-2), keys.amin(-2), keys.mean(-2)), -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
    """RMSNorm over the last dim, where there is a weight; fp32 or wider."""
    x = _wide(x)
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * weight.to(x.dtype)
