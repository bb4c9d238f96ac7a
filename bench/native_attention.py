"""Trainable NOSA attention in plain torch (arXiv:2510.13602): what the runtime serves, with gradients.

The context of a sequence is read densely, as a prompt is; every later token attends to the blocks that a decode step
would select for it. Both add the learned importance of a key to its logit: weight ~ exp(q.k * scale + cis),
cis = A * softplus(delta(v)). Blocks are selected twice over: the best by attention to overlapping windows of keys, then
the most important by pooled cis among what is left.

Selection has no gradient of its own, so `alignment` asks the ranking scores of a row for the shares of its dense
attention (the idea of SeerAttention, arXiv:2410.13276), in the blocks that are open to choice only.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, softplus

from csrc_free_kernels.reference.select import select

NAME = "native_training"
UNIT = 16
"""Tokens between two windows; a window is two units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Blocks of a step: `budget` of them, `sink` and `recent` forced, `agnostic` of the rest by importance."""

    block_size: int = 64
    unit: int = UNIT
    budget: int = 8
    sink: int = 1
    recent: int = 2
    agnostic: int = 2

    @property
    def tokens(self) -> int:
        """Return the budget in tokens."""
        return self.budget * self.block_size

    @property
    def query(self) -> int:
        """Return the blocks chosen by score."""
        return self.budget - self.sink - self.recent - self.agnostic

    @property
    def share(self) -> float:
        """Return the part of the blocks open to choice that importance has: `selection.query_agnostic_share`."""
        return self.agnostic / (self.query + self.agnostic)


@dataclass(slots=True, kw_only=True)
class Pass:
    """What one forward pass tells its attention layers, and what they leave behind.

    Attributes:
        context_tokens: tokens ahead of this position are read densely.
        geometry: how later rows rank blocks; None: not at all, and they are dense too.
        sparse: attend to the selected blocks only; else later rows are dense, and ranking is learnt from them.
        bias: add cis to the logits.
        align: measure the alignment of the ranking scores.
        losses: one scalar a layer when `align`.
    """

    context_tokens: int
    geometry: Geometry | None
    sparse: bool = True
    bias: bool = True
    align: bool = False
    losses: list[Tensor] = field(default_factory=list)


class ImportanceHead(nn.Module):
    """The learned, query-independent importance of a token: cis = A * softplus(delta(v))."""

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(num_kv_heads))
        self.delta = nn.Linear(num_kv_heads * head_dim, num_kv_heads)

    def forward(self, v: Tensor) -> Tensor:
        """v [B, Hkv, T, D] -> cis [B, Hkv, T], at least fp32."""
        with torch.autocast(v.device.type, enabled=False):
            raw = self.delta(wide(v.transpose(1, 2).flatten(2)))
            return (self.A * softplus(raw)).transpose(1, 2)


def wide(x: Tensor) -> Tensor:
    """Return x in fp32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def window_means(x: Tensor, unit: int) -> Tensor:
    """Mean over windows of two units, one every unit: [..., T] along dim 2 -> [..., T // unit - 1]."""
    units = x.shape[2] // unit
    means = x[:, :, : units * unit].unflatten(2, (units, unit)).mean(3)
    return (means[:, :, :-1] + means[:, :, 1:]) / 2


def pool_blocks(windows: Tensor, geometry: Geometry, num_blocks: int) -> Tensor:
    """Best of the windows that touch a block: [..., num windows] -> [..., num_blocks]; -inf where none does."""
    per_block = geometry.block_size // geometry.unit
    width = num_blocks * per_block + 1
    padded = pad(windows, (1, width - 1 - windows.shape[-1]), value=-torch.inf)
    return padded.unfold(-1, per_block + 1, per_block).amax(-1)


def ranking_scores(
    q: Tensor, k: Tensor, cis: Tensor, first: int, scale: float, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Score the blocks for query rows at positions `first` on.

    Args:
        q: [B, Hq, R, D] after RoPE.
        k: [B, Hkv, T, D] after RoPE, T = first + R.
        cis: [B, Hkv, T].
        first: position of the first row.
        scale: factor on q.k.
        geometry: blocks and windows.

    Returns:
        Query scores and pooled importance, at least fp32 [B, Hkv, R, N], -inf where no finished window touches a block.
    """
    rows, tokens, heads = q.shape[2], k.shape[2], k.shape[1]
    num_blocks = -(-tokens // geometry.block_size)
    means = window_means(wide(k), geometry.unit)
    positions = torch.arange(first, tokens, device=q.device)
    finished = (positions + 1) // geometry.unit
    exists = torch.arange(means.shape[2], device=q.device) + 2 <= finished[:, None]  # [R, windows]
    grouped = wide(q).unflatten(1, (heads, -1))  # [B, Hkv, G, R, D]
    logits = torch.einsum("bhgrd,bhwd->bhgrw", grouped, means) * scale
    # Finite, so that rows without any window have a softmax and a gradient.
    weights = logits.masked_fill(~exists, -1e30).softmax(-1).sum(2)
    scores = pool_blocks(weights.masked_fill(~exists, -torch.inf), geometry, num_blocks)
    important = window_means(wide(cis)[..., None], geometry.unit)[..., 0]
    important = important[:, :, None].expand(-1, -1, rows, -1).masked_fill(~exists, -torch.inf)
    return scores, pool_blocks(important, geometry, num_blocks)


def select_blocks(scores: Tensor, importance: Tensor, first: int, geometry: Geometry) -> Tensor:
    """Mark the blocks each row attends to, by the runtime's own rule; bool [B, Hkv, R, N]."""
    batch, heads, rows, num_blocks = scores.shape
    lens = torch.arange(first + 1, first + rows + 1, device=scores.device, dtype=torch.int32).repeat(batch)

    def folded(x: Tensor) -> Tensor:
        return x.detach().transpose(1, 2).flatten(0, 1)  # [B * R, Hkv, N]

    ids = torch.empty(batch * rows, heads, geometry.budget, dtype=torch.int32, device=scores.device)
    select(
        folded(scores), folded(importance), lens, ids, torch.empty_like(ids[..., 0]),
        block_size=geometry.block_size, sink_blocks=geometry.sink, recent_blocks=geometry.recent,
        query_blocks=geometry.query, agnostic_blocks=geometry.agnostic, heat_decay=1.0, normalise="none",
    )  # fmt: skip
    marks = torch.zeros(batch * rows, heads, num_blocks + 1, dtype=torch.bool, device=scores.device)
    place = torch.where(ids < 0, num_blocks, ids).long()
    return marks.scatter_(2, place, True)[..., :num_blocks].unflatten(0, (batch, rows)).transpose(1, 2)


def native_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    native: Pass,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention function for transformers; `native` reaches it as a keyword argument of the model's forward.

    Args:
        module: the attention layer; its `importance` is an `ImportanceHead` where `native.bias`.
        query: [B, Hq, T, D]; key, value: [B, Hkv, T, D], after RoPE.
        attention_mask: not used; batches have no padding.
        scaling: factor on q.k.
        native: see `Pass`.

    Returns:
        [B, T, Hq, D] and None.
    """
    first = native.context_tokens
    query, key = (
        query.to(value.dtype),
        key.to(value.dtype),
    )  # under autocast the rotary product left them in fp32
    cis = module.importance(value) if native.bias else value.new_zeros(value.shape[:3])
    context = _dense_causal(
        query[:, :, :first], key[:, :, :first], value[:, :, :first], cis[:, :, :first], scaling
    )
    rows = _rows(query[:, :, first:], key, value, cis, scaling, native)
    return torch.cat((context, rows), 2).transpose(1, 2), None


def _dense_causal(q: Tensor, k: Tensor, v: Tensor, cis: Tensor, scale: float) -> Tensor:
    """The bias rides along as one more channel of the keys, so that a fused kernel can do it (8 keep it aligned)."""
    group = q.shape[1] // k.shape[1]
    extra = torch.zeros_like(q[..., :8])
    extra[..., 0] = 1 / scale
    bias = pad(cis[..., None], (0, 7)).to(k.dtype)
    q, k, v = torch.cat((q, extra.to(q.dtype)), -1), torch.cat((k, bias), -1), pad(v, (0, 8))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :-8]


def _rows(q: Tensor, k: Tensor, v: Tensor, cis: Tensor, scale: float, native: Pass) -> Tensor:
    """Attention of the rows behind the context, dense or over selected blocks; not in bf16: the logits get large."""
    with torch.autocast(q.device.type, enabled=False):
        return _wide_rows(wide(q), wide(k), wide(v), wide(cis), scale, native).to(v.dtype)


def _wide_rows(q: Tensor, k: Tensor, v: Tensor, cis: Tensor, scale: float, native: Pass) -> Tensor:
    heads, tokens, first = k.shape[1], k.shape[2], native.context_tokens
    grouped = q.unflatten(1, (heads, -1))  # [B, Hkv, G, R, D]
    logits = torch.einsum("bhgrd,bhtd->bhgrt", grouped, k) * scale + cis[:, :, None, None]
    positions = torch.arange(tokens, device=q.device)
    seen = positions <= positions[first:, None]  # [R, T]
    if native.geometry is not None:
        scores, importance = ranking_scores(q, k, cis, first, scale, native.geometry)
        if native.align:
            native.losses.append(alignment(logits, seen, scores, first, native.geometry))
    if native.geometry is not None and native.sparse:
        chosen = select_blocks(scores, importance, first, native.geometry)
        seen = seen & chosen.repeat_interleave(native.geometry.block_size, -1)[..., :tokens]
        seen = seen[:, :, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhgrt,bhtd->bhgrd", weights, v).flatten(1, 2)


def alignment(logits: Tensor, seen: Tensor, scores: Tensor, first: int, geometry: Geometry) -> Tensor:
    """Cross entropy of the ranking scores against the dense attention's share of every block open to choice.

    A row counts by the attention it gives to such blocks; a head that looks at sink and recent only has no say. One key
    hardly moves the mean of a window, so the scores are raised to a power first (they rank the same): else all that is
    learnt is longer queries, not keys of filler that keep quiet.

    Args:
        logits: [B, Hkv, G, R, T] with the bias; no gradient goes into them.
        seen: bool [R, T], causality.
        scores: [B, Hkv, R, N] of `ranking_scores`.
        first: position of the first row.
        geometry: blocks and windows.
    """
    size, num_blocks = geometry.block_size, scores.shape[-1]
    with torch.no_grad():
        mass = logits.masked_fill(~seen, -torch.inf).softmax(-1)  # [B, Hkv, G, R, T]
        mass = pad(mass, (0, num_blocks * size - mass.shape[-1])).unflatten(-1, (num_blocks, size)).sum(-1)
        mass = mass.square().sum(2)  # [B, Hkv, R, N]
        last = torch.arange(first, first + scores.shape[2], device=scores.device) // size
        block = torch.arange(num_blocks, device=scores.device)
        choice = (block >= geometry.sink) & (block <= last[:, None] - geometry.recent)
        mass = mass * choice
    sharp = geometry.unit * scores.clamp(min=1e-30).log()
    return -(mass * sharp.masked_fill(~choice, -1e30).log_softmax(-1)).sum(-1).mean()
