"""Bounds of groups of blocks, for `selection.index`: written here after a chunk, in a step by op `open_groups`."""

import torch

from rheo_offload.cache.device_pool import FullLayer


def complete_groups(layer: FullLayer, host_table: torch.Tensor, row: int, before: int, after: int) -> None:
    """Write the bounds of the groups that a row completed between `before` and `after` tokens, if the layer keeps any.

    Args:
        layer: the layer, its summaries of those blocks written.
        host_table: int32 [rows, N] of the whole cache.
        row: the row.
        before: tokens whose groups have their bounds; 0: all are written anew.
        after: tokens that the row holds.
    """
    if layer.group_bounds is None or layer.summary is None:
        return
    size = layer.group_blocks
    first, end = (tokens // (layer.layout.block_size * size) for tokens in (before, after))
    if first == end:
        return
    pages = host_table[row, first * size : end * size].long()
    by_group = layer.summary[pages, :, 0].unflatten(0, (-1, size))  # [groups, size, Hkv, D]
    bounds = torch.stack((by_group.amax(1), by_group.amin(1)), 2)
    layer.group_bounds[row, :, first:end] = bounds.transpose(0, 1)
