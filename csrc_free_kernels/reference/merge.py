"""Merging partial attention results by log-sum-exp, in plain torch."""

import torch
from torch import Tensor


def merge(
    out_parts: Tensor, lse_parts: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor | None
) -> None:
    """Combine partial attentions over disjoint sets of keys into the attention over their union.

    Args:
        out_parts: fp32 or fp64 [T, B, Hq, D], each part normalised over its own keys.
        lse_parts: [T, B, Hq], natural log; -inf marks a part without keys, whose out is not read.
        sinks: [Hq] or None: an extra logit a head that takes weight but has no value.
        out: [B, Hq, D] in the model's dtype; 0 where there are no keys.
        lse: [B, Hq] or None to skip; of the keys alone, without the sink; -inf where there are none.
    """
    keys = torch.logsumexp(lse_parts, 0)  # [B, Hq]
    total = keys if sinks is None else torch.logaddexp(keys, sinks.to(keys.dtype))
    weights = torch.exp(lse_parts - total.masked_fill(total == -torch.inf, 0))[..., None]
    out.copy_((weights * out_parts.masked_fill(weights == 0, 0)).sum(0))
    if lse is not None:
        lse.copy_(keys)
