"""Summaries of the sub-units and blocks that a chunk of prompt tokens completed."""

from typing import Literal

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import (
    BF16,
    FASTMATH,
    FP32,
    as_numpy,
    code_of,
    decode,
    encode_bf16,
    encode_fp16,
)
from csrc_free_kernels.reference.summarize_chunk import unit_tokens

NONE, MEAN, MINMAX, CUBOID = 0, 1, 2, 3
KINDS = {"none": NONE, "mean": MEAN, "minmax": MINMAX, "cuboid": CUBOID}


@nb.njit(cache=True, fastmath=FASTMATH)
def fold_key(key, first, high, low, code, kind):
    """Fold one key [D] into the accumulators: the sum or maximum, and the minimum; `first` starts them."""
    for d in range(len(key)):
        x = decode(key[d], code)
        if first:
            high[d] = x
            low[d] = x
        elif kind == MEAN:
            high[d] += x
        else:
            high[d] = max(high[d], x)
            low[d] = min(low[d], x)


@nb.njit(cache=True, fastmath=FASTMATH)
def start_radius(high, low):
    """Turn maxima and minima [D] into centres, in `high`, and empty sums of distances, in `low`."""
    for d in range(len(high)):
        high[d] = (high[d] + low[d]) * np.float32(0.5)
        low[d] = 0.0


@nb.njit(cache=True, fastmath=FASTMATH)
def fold_radius(key, centre, total, code):
    """Add the distances of one key [D] from the centres."""
    for d in range(len(key)):
        total[d] += abs(decode(key[d], code) - centre[d])


@nb.njit(cache=True, fastmath=FASTMATH)
def finish_cuboid(high, low, unit):
    """Turn centres and sums of distances [D] into the upper and the lower faces."""
    for d in range(len(high)):
        radius = low[d] / np.float32(unit)
        low[d] = high[d] - radius
        high[d] += radius


@nb.njit(cache=True, fastmath=FASTMATH)
def encode_row(out, values, scale, code):
    """Write scale * values [D] in the dtype of `out`."""
    if code == FP32:
        for d in range(len(values)):
            out[d] = scale * values[d]
    elif code == BF16:
        for d in range(len(values)):
            out[d] = encode_bf16(scale * values[d])
    else:
        for d in range(len(values)):
            out[d] = encode_fp16(scale * values[d])


@nb.njit(cache=True, fastmath=FASTMATH)
def store_summary(summary, u, high, low, unit, code, kind):
    """Write what stands for sub-unit `u` of one page and head, summary [W, D]: one vector (mean) or two."""
    if kind == MEAN:
        encode_row(summary[u], high, np.float32(1.0) / np.float32(unit), code)
    else:
        encode_row(summary[2 * u], high, np.float32(1.0), code)
        encode_row(summary[2 * u + 1], low, np.float32(1.0), code)


# One iteration: a (row, head, unit). k [B, Hkv, Q, D]; k_host [P, Hkv, C, D]; summary [P, Hkv, W, D].
@nb.njit(cache=True, parallel=True, fastmath=FASTMATH)
def summarize_chunk_kernel(k, start, host_table, k_host, summary, unit, code, summary_code, kind):
    num_rows, num_kv_heads, num_tokens, head_dim = k.shape
    block_size = k_host.shape[2]
    max_units = (num_tokens + unit - 1) // unit
    for i in nb.prange(num_rows * num_kv_heads * max_units):
        b, h = i // (num_kv_heads * max_units), i // max_units % num_kv_heads
        first = start[b]
        begin = (max(first, 0) // unit + i % max_units) * unit
        if begin + unit <= first + num_tokens:
            page, offset = host_table[b, begin // block_size], begin % block_size
            high, low = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
            for t in range(unit):
                if begin + t < first:
                    fold_key(k_host[page, h, offset + t], t == 0, high, low, code, kind)
                else:
                    fold_key(k[b, h, begin + t - first], t == 0, high, low, code, kind)
            if kind == CUBOID:
                start_radius(high, low)
                for t in range(unit):
                    if begin + t < first:
                        fold_radius(k_host[page, h, offset + t], high, low, code)
                    else:
                        fold_radius(k[b, h, begin + t - first], high, low, code)
                finish_cuboid(high, low, unit)
            store_summary(summary[page, h], offset // unit, high, low, unit, summary_code, kind)


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
        k: [B, Hkv, Q, D], fp32, bf16 or fp16; negative positions are padding.
        start: int32 [B], tokens.
        host_table: int32 [B, N].
        k_host: [P, Hkv, C, D], of the dtype of `k`; tokens before `start` are read from it.
        summary: [P, Hkv, W, D], written in place; other entries are left alone.
        summary_kind: `mean` (sub-units of C / W tokens), `minmax` or `cuboid` (of 2C / W tokens).
    """
    unit = unit_tokens(summary_kind, k_host.shape[2], summary.shape[2])
    summarize_chunk_kernel(
        as_numpy(k),
        start.numpy(),
        host_table.numpy(),
        as_numpy(k_host),
        as_numpy(summary),
        unit,
        code_of(k),
        code_of(summary),
        KINDS[summary_kind],
    )
