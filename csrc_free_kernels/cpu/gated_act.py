"""Gated activation over a merged gate-up projection. One thread: it is small beside the projections."""

import math

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import as_numpy, code_of, decode
from csrc_free_kernels.cpu.rows import rounded, write_row


# gate_up [T, 2 * I]; out [T, I].
@nb.njit(cache=True)
def gated_act_kernel(gate_up, out, code, silu):
    width = out.shape[1]
    row = np.empty(width, np.float32)
    for t in range(out.shape[0]):
        for i in range(width):
            gate = decode(gate_up[t, i], code)
            z = gate
            if not silu:  # 0.5 * (1 + tanh(u)) is sigmoid(2 u), without the cancellation
                z = np.float32(1.5957691216057308) * (gate + np.float32(0.044715) * gate * gate * gate)
            act = rounded(gate / (np.float32(1) + np.float32(math.exp(-z))), code)
            row[i] = act * decode(gate_up[t, width + i], code)
        write_row(row, out[t], code)


def gated_act(gate_up: Tensor, out: Tensor, *, act: str) -> None:
    """Write act(gate) * up, the activation rounded to the dtype ahead of the product.

    Args:
        gate_up: [T, 2 * I], fp32, bf16 or fp16: gate, then up.
        out: [T, I] in the same dtype.
        act: `silu` or `gelu_tanh`.

    Raises:
        ValueError: another activation.
    """
    if act not in ("silu", "gelu_tanh"):
        raise ValueError(f"act must be silu or gelu_tanh, not {act!r}")
    gated_act_kernel(as_numpy(gate_up), as_numpy(out), code_of(out), act == "silu")
