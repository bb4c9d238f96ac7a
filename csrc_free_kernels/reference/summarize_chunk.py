"""Summaries of the sub-units and blocks that a chunk of prompt tokens completed."""

from typing import Literal

import torch
from torch import Tensor


def summarize(keys: Tensor, kind: str) -> Tensor:
    """Reduce keys [..., U, D] over U, in fp32 or better: `mean` -> [..., 1, D], `minmax` -> [..., 2, D].

    Mean keys stand for sub-units in InfLLM-V2 (arXiv:2509.24663), channel-wise maxima and minima for blocks
    in Quest (arXiv:2406.10774).
    """
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    if kind == "mean":
        return keys.mean(dim=-2, keepdim=True)
    return torch.stack((keys.amax(dim=-2), keys.amin(dim=-2)), dim=-2)


def summarize_chunk(
    k: Tensor,
    start: Tensor,
    host_table: Tensor,
    k_host: Tensor,
    summary: Tensor,
    *,
    summary_kind: Literal["mean", "minmax"],
) -> None:
    """Compute every summary entry whose last token lies in `[max(start, 0), start + Q)`.

    Args:
        k: [B, Hkv, Q, D], the chunk; token i has position `start[b] + i`, negative positions are padding.
        start: int32 [B].
        host_table: int32 [B, N].
        k_host: [P, Hkv, C, D], host memory; tokens before `start` are read from it.
        summary: [P, Hkv, W, D], written in place; other entries are left alone.
        summary_kind: `mean` (sub-units of C / W tokens) or `minmax` (whole blocks, W = 2).
    """
    block_size, width = k_host.shape[2], summary.shape[2]
    unit = block_size // width if summary_kind == "mean" else block_size
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
        if summary_kind == "mean":
            summary[pages, :, (units % width).to(summary.device)] = entries[:, :, 0].transpose(0, 1)
        else:
            summary[pages] = entries.transpose(0, 1)
