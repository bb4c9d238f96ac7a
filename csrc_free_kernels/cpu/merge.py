"""Merging partial attention results by log-sum-exp."""

import math

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
from csrc_free_kernels.reference.merge import late_parts_of

# what an absent tensor is passed as
NO_SINKS = np.zeros(0, np.float32)
NO_LSE = np.zeros((0, 0), np.float32)
ALL_PARTS = np.zeros((0, 0), np.int32)


# One iteration: a (row, query head). parts [T, B, Hq, D]; lse_parts [T, B, Hq]; counts: parts there are, [B, Hkv],
# or [0, 0]: all; sinks [Hq] or [0]; out [B, Hq, D]; lse [B, Hq] or [0, 0]. Weights are relative to
# the largest lse, so nothing overflows.
@nb.njit(cache=True, parallel=True, fastmath=FASTMATH)
def merge_kernel(parts, lse_parts, counts, sinks, sink_code, out, out_code, lse):
    all_parts, batch, num_q_heads, head_dim = parts.shape
    for i in nb.prange(batch * num_q_heads):
        b, h = i // num_q_heads, i % num_q_heads
        num_parts = all_parts
        if counts.size > 0:
            num_parts = counts[b, h * counts.shape[1] // num_q_heads]
        top = np.float32(-np.inf)
        for t in range(num_parts):
            top = max(top, lse_parts[t, b, h])
        total = np.float32(0)
        acc = np.zeros(head_dim, np.float32)
        for t in range(num_parts):
            if lse_parts[t, b, h] != -np.inf:  # NaN is no empty part: it must reach the result
                w = np.float32(math.exp(lse_parts[t, b, h] - top))
                total += w
                for d in range(head_dim):
                    acc[d] += w * parts[t, b, h, d]
        if lse.size > 0:
            lse[b, h] = top + math.log(total) if total != 0 else -np.inf
        scale = np.float32(0)
        if total != 0:
            scale = np.float32(1) / total
            if sinks.size > 0:
                sink = decode(sinks[h], sink_code)
                shift = max(top, sink)
                keys = np.float32(math.exp(top - shift))
                scale = keys / (total * keys + np.float32(math.exp(sink - shift)))
        if out_code == FP32:
            for d in range(head_dim):
                out[b, h, d] = scale * acc[d]
        elif out_code == BF16:
            for d in range(head_dim):
                out[b, h, d] = encode_bf16(scale * acc[d])
        else:
            for d in range(head_dim):
                out[b, h, d] = encode_fp16(scale * acc[d])


def merge(
    out_parts: Tensor,
    lse_parts: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    splits: int | None = None,
    late_slots: Tensor | None = None,
) -> None:
    """Combine partial attentions over disjoint sets of keys into the attention over their union.

    Args:
        out_parts: fp32 [T, B, Hq, D], each part normalised over its own keys.
        lse_parts: fp32 [T, B, Hq], natural log; -inf marks a part without keys, whose out is not read.
        sinks: [Hq], fp32, bf16 or fp16, or None: an extra logit a head that takes weight but has no value.
        out: [B, Hq, D] in the model's dtype; 0 where there are no keys.
        lse: fp32 [B, Hq] or None to skip; of the keys alone, without the sink; -inf where there are none.
        splits, late_slots: None, or how many parts there always are, and the slots int32 [B, Hkv, S] of loaded blocks
            (-1: not loaded): of the parts from `splits` on only those exist that `attend_loads` wrote for these.
    """
    counts = ALL_PARTS
    if late_slots is not None and splits is not None:
        counts = (splits + late_parts_of(late_slots, len(out_parts) - splits)).numpy()
    merge_kernel(
        out_parts.numpy(), lse_parts.numpy(), counts,
        NO_SINKS if sinks is None else as_numpy(sinks), FP32 if sinks is None else code_of(sinks),
        as_numpy(out), code_of(out), NO_LSE if lse is None else lse.numpy(),
    )  # fmt: skip
