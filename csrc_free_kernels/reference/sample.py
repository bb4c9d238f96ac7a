"""Truth of `sample`: temperature, top-k, top-p and one draw a row, the same token on every device.

What makes it the same: probabilities become integers (`weigh`, IEEE fp32 operations in a fixed order, no fused
multiply-add), so their sums do not depend on the order; random numbers come from Philox-4x32-10 keyed by the seed and
counted by the position (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

import torch
from torch import Tensor

from csrc_free_kernels.reference.sample_greedy import broken_rows

LOG2_E = 1.44269502162933349609375  # rounded to fp32
LOWEST_EXPONENT = -42  # below it a weight is 0
# 2^f = 1 + f * (c0 + c1 f + ... + c4 f^4) on [0, 1), relative error 1.6e-7; all are fp32 numbers
EXP2_COEFFICIENTS = (
    0.6931512951850891,
    0.24016444385051727,
    0.05579991266131401,
    0.009017029777169228,
    0.0018671301659196615,
)
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
MASK_32 = 0xFFFFFFFF


def sample(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    scratch: Tensor | None,
    tokens: Tensor,
    bad: Tensor,
) -> None:
    """Draw one token a row: a function of the row's logits, parameters, seed and position alone.

    Args:
        logits: [B, V], any float dtype, rows may be strided; -inf is never drawn. Computed on as fp32.
        positions: int64 [B], the position that the drawn token will have.
        temperature: fp32 [B]; 0 (or less): the most likely token, as `sample_greedy`.
        top_k: int32 [B], keep this many; 0 (or less), or V and more: all.
        top_p: fp32 [B], keep the smallest set of most likely tokens with this mass; 1 (or more): all.
        seed: int64 [B].
        scratch: not used here (Triton: int64 [>= B, SCRATCH_WORDS]).
        tokens: int64 [B], written in full; 0 for a row with NaN, with +inf or without a finite logit.
        bad: int32 [B], set to 1 for such a row and left alone otherwise.
    """
    x = logits.float()
    broken = broken_rows(x)
    uniform = uniform_53(seed, positions)
    for b in range(x.shape[0]):
        if broken[b]:
            tokens[b] = 0
        elif not temperature[b] > 0:
            tokens[b] = x[b].argmax()
        else:
            tokens[b] = _draw(x[b], temperature[b], int(top_k[b]), top_p[b], uniform[b])
    bad |= broken


def _draw(x: Tensor, temperature: Tensor, top_k: int, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draw from one row [V] that holds something finite."""
    weight = kept_weights(x, temperature, top_k, top_p)
    return (weight.cumsum(0) <= pick(uniform, weight.sum())).sum()


def kept_weights(x: Tensor, temperature: Tensor, top_k: int, top_p: Tensor) -> Tensor:
    """Return the weights of one row [V], 0 for what top-k and then top-p drop; equal logits stay or go together."""
    weight = weigh(x, x.max(), temperature)
    if 0 < top_k < x.shape[0]:
        weight = torch.where(x >= x.topk(top_k).values[-1], weight, 0)
    if top_p < 1:
        target = (top_p.double() * weight.sum().double()).long().clamp(min=1)
        order = x.argsort(descending=True, stable=True)
        crossing = (weight[order].cumsum(0) < target).sum()
        weight = torch.where(x >= x[order[crossing]], weight, 0)
    return weight


def weigh(x: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """Return int64 weights, 2^40 for the largest logit `top`: 2^40 * exp((x - top) / temperature), cut at 2^-2."""
    scale = (torch.full_like(temperature, LOG2_E) / temperature).clamp(max=3.0e38)
    a = ((x - top) * scale).clamp(min=LOWEST_EXPONENT)
    whole = a.floor()
    f = a - whole
    p = torch.full_like(f, EXP2_COEFFICIENTS[-1])
    for c in EXP2_COEFFICIENTS[-2::-1]:
        p = p * f + c
    return ((p * f + 1.0) * 2.0**29).long() << 11 >> -whole.long()


def pick(uniform: Tensor, total: Tensor) -> Tensor:
    """Scale 53 random bits to an integer in [0, total)."""
    return torch.minimum((uniform.double() * 2.0**-53 * total.double()).long(), total - 1)


def uniform_53(seed: Tensor, position: Tensor) -> Tensor:
    """Return 53 random bits (int64) for every (seed, position)."""
    zero = torch.zeros_like(position)
    words = philox(
        (position & MASK_32, position >> 32 & MASK_32, zero, zero), (seed & MASK_32, seed >> 32 & MASK_32)
    )
    return words[1] << 21 | words[0] >> 11


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four counter words and two key words to four random words, all int64 below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = (
            c0 * PHILOX_MULTIPLIERS[0],
            c2 * PHILOX_MULTIPLIERS[1],
        )  # wraps: the 64 bits are those of uint64
        c0, c2 = (right >> 32 & MASK_32) ^ c1 ^ k0, (left >> 32 & MASK_32) ^ c3 ^ k1
        c1, c3 = right & MASK_32, left & MASK_32
        k0, k1 = k0 + PHILOX_WEYL[0] & MASK_32, k1 + PHILOX_WEYL[1] & MASK_32
    return c0, c1, c2, c3
