"""Rotary position embedding of queries and keys in place, their per-head norms in front. One thread."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import as_numpy, code_of
from csrc_free_kernels.cpu.rows import norm_row, read_row, rounded, write_row


# x [T, H, D]; cos, sin [A, R]; weight [D] or [0].
@nb.njit(cache=True)
def turn_heads(x, cos, sin, weight, code, eps, offset):
    half = cos.shape[1] // 2
    row = np.empty(x.shape[2], np.float32)
    c, s = np.empty(2 * half, np.float32), np.empty(2 * half, np.float32)
    for t in range(x.shape[0]):
        read_row(cos[t % cos.shape[0]], code, c)
        read_row(sin[t % sin.shape[0]], code, s)
        for h in range(x.shape[1]):
            read_row(x[t, h], code, row)
            if weight.size > 0:
                norm_row(row, weight, eps, offset, code)
            for i in range(half):
                a, b = row[i], row[half + i]
                row[i] = rounded(rounded(a * c[i], code) - rounded(b * s[i], code), code)
                turned = rounded(b * c[half + i], code) + rounded(a * s[half + i], code)
                row[half + i] = rounded(turned, code)
            write_row(row, x[t, h], code)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 0.0,
    offset: int = 0,
) -> None:
    """Rotate the halves of every head of `q` and `k` in place.

    Args:
        q: [T, Hq, D], fp32, bf16 or fp16, overwritten.
        k: [T, Hkv, D], overwritten.
        cos: [A, R], R <= D even; T is a multiple of A and token t takes row t % A. Channels from R on pass through.
        sin: [A, R].
        q_weight: [D] or None: RMS norm of every query head ahead of the rotation (then R == D), as `rms_norm`.
        k_weight: [D], with `q_weight`.
        eps: of the norms.
        offset: of the norms.
    """
    for x, weight in ((q, q_weight), (k, k_weight)):
        array = as_numpy(x)
        turn_heads(
            array, as_numpy(cos), as_numpy(sin), array[0, 0, :0] if weight is None else as_numpy(weight),
            code_of(x), eps, offset,
        )  # fmt: skip
