"""What a replay of locality reads of a captured window: how every block ranks, and how much attention it has, by step.

Blocks rank by their mean keys (`mean_key`), or by the best of the overlapping windows that touch them (`infllm_v2`, and
`nosa` with the bias of its learned heads, pooled over the same windows).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bench.native_attention import Geometry, pool_blocks
from rheo_offload.calibration.capture import Sample
from rheo_offload.calibration.score import WARM_QUERIES, mean_key_scores
from rheo_offload.selection.base import normalised

__all__ = ["MEAN_KEY", "Ranking", "Streams", "streams_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How a query ranks blocks."""

    method: Literal["mean_key", "infllm_v2"]
    stride: int = 0
    """Tokens between two windows of `infllm_v2`; a window is twice as long."""


MEAN_KEY = Ranking(method="mean_key")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streams:
    """S (layer, KV head) over T consecutive queries; the first `WARM_QUERIES` are the prompt's last. N blocks."""

    positions: Tensor  # int64 [T]
    scores: Tensor  # fp32 [T, S, N], -inf where there is nothing to score yet
    start_shares: Tensor  # fp32 [S, N], the heat from scores that a prompt leaves
    mass: Tensor  # fp32 [T, S, N], attention weight on a block
    strong: Tensor  # bool [T, S, N], blocks with a token that one query head gives more than half of its attention
    bias: Tensor | None = None  # fp32 [T, S, N], pooled; -inf where there is nothing to pool yet
    block_size: int
    block_bytes: int

    @property
    def prompt_blocks(self) -> int:
        """Blocks, all whole, before the first step."""
        return int(self.positions[WARM_QUERIES]) // self.block_size


def streams_of(
    samples: Mapping[int, Sample], ranking: Ranking = MEAN_KEY, *, block_size: int, itemsize: int
) -> Streams:
    """Join the layers of a window that was captured in blocks of some divisor of `block_size` and of the stride.

    Args:
        samples: by layer; queries are consecutive, and the first step begins a block.
        ranking: how blocks are scored.
        block_size: tokens.
        itemsize: bytes of an element of the cache.

    Raises:
        ValueError: the window is not whole blocks, or the first step is inside one.
    """
    wide = [_widened(sample, block_size) for sample in samples.values()]
    positions, first = wide[0].positions, int(wide[0].positions[WARM_QUERIES])
    if first % block_size:
        raise ValueError(f"a prompt of {first} tokens is not whole blocks of {block_size}")
    # A prompt's last queries score every block of it, as one call of the runtime does.
    ended = positions.clamp(min=first - 1)
    bias = None
    if ranking.method == "mean_key":
        whole = [replace(sample, positions=ended) for sample in wide]
        scores = torch.cat([mean_key_scores(sample) for sample in whole], 1)
        start = normalised(scores, "sum")[:WARM_QUERIES].mean(0)
        scores = scores.masked_fill(~whole[0].closed()[:, None], -torch.inf)
    else:
        geometry = Geometry(block_size=block_size, unit=ranking.stride)
        fine = [replace(_widened(s, ranking.stride), positions=ended) for s in samples.values()]
        weights = torch.cat([_window_weights(sample) for sample in fine], 1)
        blocks = wide[0].mass.shape[2]
        scores = pool_blocks(weights, geometry, blocks)
        start = normalised(pool_blocks(weights[:WARM_QUERIES].mean(0), geometry, blocks), "sum")
        if all(sample.bias is not None for sample in fine):
            bias = pool_blocks(torch.cat([_window_bias(sample) for sample in fine], 1), geometry, blocks)
    return Streams(
        positions=positions,
        scores=scores,
        start_shares=start,
        mass=torch.cat([sample.mass for sample in wide], 1),
        strong=torch.cat([sample.peak for sample in wide], 1) > 0.5,
        bias=bias,
        block_size=block_size,
        block_bytes=2 * block_size * wide[0].q.shape[-1] * itemsize,
    )


def _widened(sample: Sample, block_size: int) -> Sample:
    """Return a sample in larger blocks; what a replay does not read is left as it was."""
    factor, odd = divmod(block_size, sample.block_size)
    if odd or sample.mass.shape[2] % factor:
        raise ValueError(
            f"{sample.mass.shape[2]} blocks of {sample.block_size} tokens are not whole blocks of {block_size}"
        )
    return replace(
        sample,
        mean_keys=sample.mean_keys.unflatten(0, (-1, factor)).mean(1),
        mass=sample.mass.unflatten(2, (-1, factor)).sum(-1),
        peak=sample.peak.unflatten(2, (-1, factor)).amax(-1),
        bias=None if sample.bias is None else sample.bias.unflatten(0, (-1, factor)).mean(1),
        block_size=block_size,
    )


def _window_weights(sample: Sample) -> Tensor:
    """Return the attention weights [T, Hkv, windows] of mean keys of two neighbouring blocks, summed over the group."""
    windows = (sample.mean_keys[:-1] + sample.mean_keys[1:]) / 2
    logits = torch.einsum("hgtd,whd->thgw", sample.q, windows) * sample.softmax_scale
    exists = _finished(sample)[:, None]
    weights = logits.masked_fill(~exists[:, None], -torch.inf).softmax(-1).sum(2)
    return weights.masked_fill(~exists, -torch.inf)


def _window_bias(sample: Sample) -> Tensor:
    """Return the mean bias of the same windows, [T, Hkv, windows]."""
    assert sample.bias is not None
    windows = ((sample.bias[:-1] + sample.bias[1:]) / 2).T
    return windows.masked_fill(~_finished(sample)[:, None], -torch.inf)


def _finished(sample: Sample) -> Tensor:
    """Return which windows are finished at each query: bool [T, windows]."""
    return sample.closed()[:, 1:]
