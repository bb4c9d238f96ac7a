"""Fit one layer's head to what its attention did: AdamW, and the weights that were best on a window held out.

Eviction head (the shape of NOSA's, arXiv:2510.13602): a token's importance `A * softplus(W v + c)`, pooled over a block
as NOSA pools it, is to say how attention will spread over the blocks from a position on, whatever the queries:
cross-entropy of the mean attention mass of all later queries against the softmax of the pooled importance, over the
blocks that are neither sink nor recent. NOSA trains it with the model through the bias it adds to the logits; here the
model is frozen, so the head ranks blocks only.

Gate (SeerAttention-R, arXiv:2506.08889): cross-entropy (the KL divergence but for a constant) of the block-wise maximum
of the attention weights, over tokens and query heads, against the gate's softmax, here too over the blocks that are
neither sink nor recent. It starts from the mean key and the mean query instead of random weights, so that little text
does. What counts for the output is the mass on a block rather than its maximum: target `mass` fits that.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from rheo_offload.calibration.capture import Sample
from rheo_offload.selection.infllm_v2 import WINDOW_STRIDE
from rheo_offload.selection.rope import Rope
from rheo_offload.selection.seer_r import SeerGate

Target = Literal["peak", "mass"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How long and how fast."""

    steps: int = 400
    """Optimiser steps at most."""
    lr: float | None = None
    """Peak learning rate, which falls to a tenth along a cosine; None: what suits the head."""
    queries: int = 128
    """Queries of one window a step."""
    every: int = 20
    """Steps between two looks at the window held out."""
    patience: int = 5
    """Looks without improvement after which the fit ends."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted head and how it went."""

    head: "Head"
    before: float
    """Loss on the window held out, with the weights it started from."""
    after: float
    """The same with the best weights, which `head` has."""
    steps: int


class Head(Protocol):
    """What is fitted: parameters, and a loss per query of a sample."""

    lr: ClassVar[float]
    """A learning rate that suits it."""

    def parameters(self) -> Sequence[Tensor]:
        """Return the leaves to optimise."""
        ...

    def loss(self, sample: Sample, queries: Tensor) -> Tensor:
        """Return the mean loss of the queries with these indices in the sample."""
        ...


class EvictionHead:
    """Token importance from the values of all KV heads; see the module."""

    lr: ClassVar[float] = 3e-2

    def __init__(self, num_kv_heads: int, head_dim: int, *, forced: tuple[int, int], seed: int = 0) -> None:
        """Start from small random weights; `forced` sink and recent blocks are none of its business."""
        generator = torch.Generator().manual_seed(seed)
        width = num_kv_heads * head_dim
        self.weight = (torch.randn(num_kv_heads, width, generator=generator) * width**-0.5).requires_grad_()
        self.offset = torch.zeros(num_kv_heads, requires_grad=True)
        self.scale = torch.ones(num_kv_heads, requires_grad=True)
        self.forced = forced

    def parameters(self) -> list[Tensor]:
        """Return W, c and A."""
        return [self.weight, self.offset, self.scale]

    def importance(self, sample: Sample) -> Tensor:
        """Return the pooled importance [Hkv, N] of a sample's blocks."""
        x = nn.functional.linear(sample.values.float(), self.weight, self.offset)
        tokens = self.scale * nn.functional.softplus(x)  # [N * C, Hkv]
        return pool_windows(tokens.T, sample.block_size)

    def loss(self, sample: Sample, queries: Tensor) -> Tensor:
        """See the module."""
        later = _later_mass(sample)[queries]  # [T, Hkv, N]
        return _cross_entropy(later, self.importance(sample), _choice(sample, self.forced)[queries])


class GateHead:
    """SeerAttention-R's gate as something to optimise; see the module."""

    lr: ClassVar[float] = 3e-4

    def __init__(
        self,
        num_kv_heads: int,
        group_size: int,
        head_dim: int,
        rope: Rope,
        *,
        softmax_scale: float,
        forced: tuple[int, int],
        target: Target = "peak",
    ) -> None:
        """Start from the mean of keys and queries.

        Args:
            num_kv_heads: of the layer.
            group_size: query heads per KV head.
            head_dim: D.
            rope: of the layer.
            softmax_scale: of the layer's attention.
            forced: sink and recent blocks, which are none of its business.
            target: `peak`, the published one, or `mass`: the attention on a block, mean over the query heads.
        """
        self.forced, self.target = forced, target
        eye = torch.eye(head_dim)
        # the gate divides by sqrt(D), the model multiplies by its softmax scale
        w_query = eye * (softmax_scale * head_dim**0.5 / group_size)
        w_key = torch.cat((0 * eye, 0 * eye, eye))
        self.gate = SeerGate(
            w_query.expand(num_kv_heads, group_size, -1, -1).clone().requires_grad_(),
            w_key.expand(num_kv_heads, -1, -1).clone().requires_grad_(),
            rope.to(torch.device("cpu")),
        )

    def parameters(self) -> list[Tensor]:
        """Return the two projections."""
        return [self.gate.w_query, self.gate.w_key]

    def logits(self, sample: Sample, queries: Tensor) -> Tensor:
        """Return the gate's logits [T, Hkv, N]; open blocks are -inf."""
        at = sample.positions[queries]
        q = self.gate.query_of(sample.q_raw[:, :, queries][None], at[None, None])[0]  # [Hkv, T, D]
        starts = torch.arange(len(sample.pooled))[:, None] * sample.block_size
        k = self.gate.key_of(sample.pooled, starts)  # [N, Hkv, D]
        logits = torch.einsum("htd,nhd->thn", q, k) * q.shape[-1] ** -0.5
        return logits.masked_fill(~sample.closed()[queries][:, None], -torch.inf)

    def loss(self, sample: Sample, queries: Tensor) -> Tensor:
        """See the module."""
        choice = _choice(sample, self.forced)[queries]
        wanted = sample.peak if self.target == "peak" else sample.mass
        return _cross_entropy(wanted[queries], self.logits(sample, queries), choice)


def fit(
    head: Head,
    samples: Sequence[Sample],
    held_out: Sample,
    options: FitOptions,
    *,
    progress: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Optimise a head in place and leave it with the weights that were best on the sample held out.

    Args:
        head: to fit; its start counts as well, so that the result is never worse on `held_out`.
        samples: windows of one layer to fit on.
        held_out: another window.
        options: see there.
        progress: called with (steps done, loss on the window held out) at every look.
    """
    leaves = list(head.parameters())
    lr = options.lr or head.lr
    optimiser = torch.optim.AdamW(leaves, lr=lr, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps, eta_min=lr / 10)
    generator = torch.Generator().manual_seed(options.seed)
    before = best = _look(head, held_out)
    kept, stale, step = copy.deepcopy([p.data for p in leaves]), 0, 0
    for step in range(1, options.steps + 1):
        sample = samples[int(torch.randint(len(samples), (), generator=generator))]
        some = torch.randperm(len(sample.positions), generator=generator)[: options.queries]
        optimiser.zero_grad()
        head.loss(sample, some).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        cosine.step()
        if step % options.every and step < options.steps:
            continue
        now = _look(head, held_out)
        if progress is not None:
            progress(step, now)
        if now < best:
            best, kept, stale = now, copy.deepcopy([p.data for p in leaves]), 0
        else:
            stale += 1
        if stale >= options.patience:
            break
    for leaf, data in zip(leaves, kept, strict=True):
        leaf.data.copy_(data)
    return Fitted(head, before, best, step)


def pool_windows(tokens: Tensor, block_size: int) -> Tensor:
    """Pool importance [H, N * C] to blocks [H, N] as NOSA does: the best mean over a window that touches the block.

    Windows of 32 tokens every 16, those inside the text; `selection.nosa` has them in the same order.
    """
    width = max(1, block_size // WINDOW_STRIDE)
    parts = tokens.unflatten(1, (-1, block_size // width)).mean(-1)
    windows = (parts[:, :-1] + parts[:, 1:]) / 2
    padded = nn.functional.pad(windows, (1, 1), value=-torch.inf)
    return padded.unfold(-1, width + 1, width).amax(-1)


def _look(head: Head, sample: Sample) -> float:
    with torch.no_grad():
        return float(head.loss(sample, torch.arange(len(sample.positions))))


def _later_mass(sample: Sample) -> Tensor:
    """Return for each query the mean mass [T, Hkv, N] of itself and all later ones."""
    summed = sample.mass.flip(0).cumsum(0).flip(0)
    return summed / torch.arange(len(summed), 0, -1)[:, None, None]


def _choice(sample: Sample, forced: tuple[int, int]) -> Tensor:
    """Return which blocks are neither sink nor recent when each query is at work: bool [T, N]."""
    sink, recent = forced
    blocks = torch.arange(sample.mass.shape[2])
    total = sample.positions // sample.block_size + 1
    return (blocks >= sink) & (blocks < (total - recent)[:, None])


def _cross_entropy(wanted: Tensor, logits: Tensor, choice: Tensor) -> Tensor:
    """Return the mean of - sum wanted log softmax(logits) over queries and heads, both over `choice` bool [T, N] only.

    `wanted` [T, Hkv, N] is normalised here; a query without a choice, or without weight there, does not count.
    """
    wanted = wanted.masked_fill(~choice[:, None], 0.0)
    logits = logits.masked_fill(~choice[:, None], -torch.inf)
    total = wanted.sum(-1, keepdim=True)
    wanted = wanted / total.clamp_min(torch.finfo(wanted.dtype).tiny)
    log_p = logits.log_softmax(-1).masked_fill(logits == -torch.inf, 0.0)  # nothing is wanted there
    losses = -(wanted * log_p).sum(-1)
    counts = total[..., 0] > 0
    return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp_min(1)
