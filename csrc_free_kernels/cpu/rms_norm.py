"""Root-mean-square norm with the residual add in front of it. One thread: it is small beside the projections."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import as_numpy, code_of, decode
from csrc_free_kernels.cpu.rows import norm_row, read_row, rounded, write_row


# x, out, residual [T, H]; weights [H]. What a flag says is absent is passed as something of the same type.
@nb.njit(cache=True)
def rms_norm_kernel(
    x, weight, out, residual, branch_weight, has_out, has_residual, has_branch, code, eps, offset, multiplier
):
    row = np.empty(x.shape[1], np.float32)
    for t in range(x.shape[0]):
        read_row(x[t], code, row)
        if has_branch:
            norm_row(row, branch_weight, eps, offset, code)
        if has_residual:
            for i in range(row.shape[0]):
                scaled = rounded(row[i] * np.float32(multiplier), code)
                row[i] = rounded(decode(residual[t, i], code) + scaled, code)
        if has_residual or has_branch:
            write_row(row, x[t], code)
        if has_out:
            norm_row(row, weight, eps, offset, code)
            write_row(row, out[t], code)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    *,
    eps: float,
    offset: int,
    residual: Tensor | None = None,
    multiplier: float = 1.0,
    branch_weight: Tensor | None = None,
) -> None:
    """Normalise rows, after adding them to the residual stream if there is one.

    Args:
        x: [T, H], fp32, bf16 or fp16; with `residual` it is overwritten by the new residual stream.
        weight: [H] or None: no norm at the end.
        out: [T, H] in x's dtype, or None with `weight`.
        eps: added to the mean square.
        offset: 0: the normed row is rounded to x's dtype, then times weight (Llama); 1: times 1 + weight in fp32, then
            rounded (Gemma).
        residual: [T, H] or None; only read.
        multiplier: factor on x ahead of the add (Granite).
        branch_weight: [H] or None: norm of x ahead of the add (Gemma's sandwich).
    """
    array = as_numpy(x)
    rms_norm_kernel(
        array, array[0] if weight is None else as_numpy(weight), array if out is None else as_numpy(out),
        array if residual is None else as_numpy(residual),
        array[0] if branch_weight is None else as_numpy(branch_weight),
        out is not None, residual is not None, branch_weight is not None,
        code_of(x), eps, offset, multiplier,
    )  # fmt: skip
