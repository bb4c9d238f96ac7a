"""Summaries of the sub-units and blocks that a chunk of prompt tokens completed."""

from typing import Literal

import torch
from torch import Tensor

VECTORS = {"mean": 1, "minmax": 2, "cuboid": 2}  # that summarise a sub-unit, one after the other


def unit_tokens(kind: str, block_size: int, width: int) -> int:
    """Return the tokens of a sub-unit, where a block of `block_size` has `width` vectors."""
    return block_size * VECTORS[kind] // width


def summarize(keys: Tensor, kind: str) -> Tensor:
    """Reduce keys [..., U, D] over U, in fp32 or better, to [..., VECTORS[kind], D].

    `mean`: mean keys (InfLLM-V2, arXiv:2509.24663). `minmax`: channel-wise maxima, minima (Quest,
    arXiv:2406.10774). `cuboid`: upper and lower faces of a box around the centre of those two that reaches as
    far as the keys do on average (ArkVale's cuboid-mean, NeurIPS 2024, pku-liang/ArkVale).
    """
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    if kind == "mean":
        return keys.mean(dim=-2, keepdim=True)
    high, low = keys.amax(dim=-2), keys.amin(dim=-2)
    if kind == "cuboid":
        centre = (high + low) / 2
        radius = (keys - centre.unsqueeze(-2)).abs().mean(dim=-2)
        high, low = centre + radius, centre - radius
    return torch.stack((high, low), dim=-2)


def summarize_chunk(
    k: Tensor,
    start: Tensor,
    host_table: Tensor,
    k_host: Tensor,
    summary: Tensor,
    *,
    summary_kind: Literal["mean", "minmax", "cuboid"],
) -> None:
    """Compute every summary entry whose last token lies in `[max(start, 0), start + Q)`.

    Args:
        k: [B, Hkv, Q, D], the chunk; token i has position `start[b] + i`, negative positions are padding.
        start: int32 [B].
        host_table: int32 [B, N].
        k_host: [P, Hkv, C, D], host memory; tokens before `start` are read from it.
        summary: [P, Hkv, W, D], written in place; other entries are left alone.
        summary_kind: `mean` (sub-units of C / W tokens), `minmax` or `cuboid` (of 2C / W tokens).
    """
    block_size, width = k_host.shape[2], summary.shape[2]
    unit = unit_tokens(summary_kind, block_size, width)
    by_unit = summary.unflatten(2, (-1, VECTORS[summary_kind]))  # [P, Hkv, units, 1 or 2, D]
    for b, first in enumerate(start.tolist()):
        units = torch.arange(max(first, 0) // unit, max(first + k.shape[2], 0) // unit)
        if len(units) == 0:
            continue
        begin, end = int(units[0]) * unit, (int(units[-1]) + 1) * unit
        keys = k[b, :, max(-first, 0) : end - first]
        if first > begin:
            page, offset = int(host_table[b, begin // block_size]), begin % block_size
            before = k_host[page, :, offset : offset + first - begin]
            keys = torch.cat((before.to(k.device), keys), dim=1)
        entries = summarize(keys.unflatten(1, (-1, unit)), summary_kind).to(
            summary
        )  # [Hkv, units, 1 or 2, D]
        pages = host_table[b].cpu()[units * unit // block_size].long().to(summary.device)
        by_unit[pages, :, (units % by_unit.shape[2]).to(summary.device)] = entries.transpose(0, 1)
