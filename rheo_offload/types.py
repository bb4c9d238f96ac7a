"""Plain value types shared by every layer of the package."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What the cache must know of one attention layer."""

    layer_idx: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    """Sliding window in tokens, the query's own included; None for full attention."""

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def is_sliding(self) -> bool:
        """Whether the layer only ever sees a window, so that its keys stay on the device."""
        return self.window is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How many blocks a (row, KV head) attends to in a decode step, and why each of them."""

    block_budget: int
    sink_blocks: int
    recent_blocks: int
    query_blocks: int
    """Best blocks for this step's query, beyond the forced ones."""
    agnostic_blocks: int
    """Hottest blocks whatever the query (they change slowly, which bounds the misses of a step)."""
    heat_decay: float
    rule: str = "fixed"
    """How many of the query and the agnostic blocks are taken: all (`fixed`), or at most all (op `select`)."""
    limit: float = 0.0
    """The rule's number."""

    def __post_init__(self) -> None:
        wanted = self.sink_blocks + self.recent_blocks + self.query_blocks + self.agnostic_blocks
        if self.recent_blocks < 1 or wanted > self.block_budget:
            raise ValueError(f"a budget of {self.block_budget} blocks cannot hold {wanted} ({self})")


@dataclass(slots=True)
class AttentionCall:
    """One layer's arguments of one attention call, as the model's forward hands them over."""

    q: torch.Tensor  # [B, Hq, Q, D] after RoPE
    k: torch.Tensor  # [B, Hkv, Q, D] the new tokens only
    v: torch.Tensor
    softmax_scale: float
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None  # [Hq] extra logits without a value
    bias: torch.Tensor | None = None  # [B, Hkv, Q] a learned number per new token, in the dtype of k
    bias_scale: float | None = None  # factor on it in the logit; None: it ranks blocks only
