"""`token_bias` on the CPU: one BLAS product in fp32."""

import torch
from torch import Tensor


def token_bias(v: Tensor, weight: Tensor, offset: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Compute `scale * softplus(weight v + offset)`, v being the values of all KV heads of a token in a row.

    Arguments as in `csrc_free_kernels/reference/token_bias.py`. Allocates fp32 copies of v and the weight.
    """
    joined = v.transpose(1, 2).flatten(2).float()
    x = torch.nn.functional.linear(joined, weight.float(), None if offset is None else offset.float())
    out.copy_(torch.nn.functional.softplus(x).mul_(scale).transpose(1, 2))
