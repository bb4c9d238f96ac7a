"""Rows of stored floats in and out of float32 scratch, and rounding to a stored type in between, inside numba."""

import numba as nb
import numpy as np

from csrc_free_kernels.cpu.bits import BF16, FP16, FP32, decode, encode_bf16, encode_fp16


@nb.njit(cache=True)
def rounded(x, code):
    """float32 -> the nearest value of the stored type, as float32."""
    if code == BF16:
        return decode(encode_bf16(x), BF16)
    if code == FP16:
        return decode(encode_fp16(x), FP16)
    return np.float32(x)


@nb.njit(cache=True)
def read_row(src, code, dst):
    """Decode src [n] into float32 dst [n]."""
    for i in range(src.shape[0]):
        dst[i] = decode(src[i], code)


@nb.njit(cache=True)
def write_row(src, dst, code):
    """Encode float32 src [n] into dst [n]."""
    if code == FP32:
        for i in range(src.shape[0]):
            dst[i] = src[i]
    elif code == BF16:
        for i in range(src.shape[0]):
            dst[i] = encode_bf16(src[i])
    else:
        for i in range(src.shape[0]):
            dst[i] = encode_fp16(src[i])


@nb.njit(cache=True)
def norm_row(row, weight, eps, offset, code):
    """RMS norm of float32 row [n] in place, rounded where the model rounds; weight [n] is stored as `code`."""
    square = np.float32(0)
    for i in range(row.shape[0]):
        square += row[i] * row[i]
    scale = np.float32(1) / np.sqrt(square / np.float32(row.shape[0]) + np.float32(eps))
    for i in range(row.shape[0]):
        w = decode(weight[i], code)
        if offset == 0:
            row[i] = rounded(rounded(row[i] * scale, code) * w, code)
        else:
            row[i] = rounded(row[i] * scale * (np.float32(offset) + w), code)
