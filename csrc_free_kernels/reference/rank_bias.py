"""Truth of `rank_bias`: what the token just appended says of the blocks behind it, by its bias."""

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["windows", "median"]


def rank_bias(
    seq_lens: Tensor,
    host_table: Tensor,
    slot_of: Tensor,
    bias_pool: Tensor,
    unit_bias: Tensor,
    heat: Tensor,
    *,
    block_size: int,
    pooling: Pooling,
) -> None:
    """Note the mean bias of the part that the new token completes, and rank the block ahead of the tail by its parts.

    After `append`, which stored the token's bias. The block ahead of the tail is closed, and the last window that
    touches it ends in the tail. `windows`: the largest mean of two neighbouring parts of which one at least is the
    block's (NOSA, arXiv:2510.13602: 32 tokens every 16). `median`: the lower median of the block's parts (DMA's
    smoothing by blocks, arXiv:2508.02124, with a part for every token).

    Args:
        seq_lens: int32 [B], tokens, the new one included; 0 = inactive: nothing is written.
        host_table: int32 [B, N].
        slot_of: int32 [B, Hkv, N]; the tail is resident.
        bias_pool: [L, C], bias of the tokens in the pool.
        unit_bias: fp32 [P, Hkv, W], means of the W parts of a block; only a completed one is written.
        heat: fp32 [B, Hkv, N]; the block ahead of the tail is written, -inf where no complete window touches it.
        block_size: C, a multiple of W.
        pooling: `windows` or `median`.

    Raises:
        ValueError: an unknown pooling.
    """
    check_pooling(pooling)
    width = unit_bias.shape[2]
    size = block_size // width
    for b, seq_len in enumerate(seq_lens.tolist()):
        if seq_len <= 0:
            continue
        block, offset = divmod(seq_len - 1, block_size)
        for h in range(slot_of.shape[1]):
            if (offset + 1) % size == 0:
                part = offset // size
                tokens = bias_pool[int(slot_of[b, h, block]), part * size : (part + 1) * size]
                unit_bias[int(host_table[b, block]), h, part] = tokens.to(unit_bias.dtype).mean()
            if block > 0:
                heat[b, h, block - 1] = _rank(
                    unit_bias[:, h], host_table[b], block - 1, seq_len // size, pooling
                )


def _rank(unit_bias: Tensor, host_table: Tensor, block: int, finished: int, pooling: Pooling) -> Tensor:
    """Rank one block by unit_bias [P, W], of which the first `finished` parts of the row exist."""
    width = unit_bias.shape[1]

    def part(i: int) -> Tensor:
        return unit_bias[int(host_table[i // width]), i % width]

    if pooling == "median":
        return unit_bias[int(host_table[block])].sort().values[(width - 1) // 2]
    lefts = range(max(block * width - 1, 0), min((block + 1) * width, finished - 1))
    windows = [(part(i) + part(i + 1)) / 2 for i in lefts]
    return torch.stack(windows).amax() if windows else torch.tensor(-torch.inf)


def check_pooling(pooling: str) -> None:
    """Raise ValueError for a pooling that no home knows."""
    if pooling not in ("windows", "median"):
        raise ValueError(f"pooling must be 'windows' or 'median', not {pooling!r}")
