"""Gated activation over a merged gate-up projection, in plain torch."""

from torch import Tensor
from torch.nn import functional as F


def gated_act(gate_up: Tensor, out: Tensor, *, act: str) -> None:
    """Write act(gate) * up, the activation rounded to the dtype ahead of the product.

    Args:
        gate_up: [T, 2 * I]: gate, then up.
        out: [T, I] in the same dtype.
        act: `silu` or `gelu_tanh`.

    Raises:
        ValueError: another activation.
    """
    gate, up = gate_up.chunk(2, -1)
    if act == "silu":
        gate = F.silu(gate)
    elif act == "gelu_tanh":
        gate = F.gelu(gate, approximate="tanh")
    else:
        raise ValueError(f"act must be silu or gelu_tanh, not {act!r}")
    out.copy_(gate * up)
