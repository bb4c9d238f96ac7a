"""Left padding: the only kind this runtime takes. It stops at the door; inside the cache there is none."""

import torch

from rheo_offload.errors import CacheError


def left_padding(mask: torch.Tensor) -> torch.Tensor:
    """Count the leading zeros of each row of an attention mask. Reads the device once.

    Args:
        mask: [B, tokens], bool or integer; a row may be padding altogether.

    Returns:
        int64 [B] on the mask's device.

    Raises:
        CacheError: a row has zeros after its first token.
    """
    zeros = ~mask.bool()
    padding = zeros.long().cumprod(1).sum(1)
    if int(zeros.sum()) != int(padding.sum()):
        raise CacheError(
            "attention_mask has zeros after the first token of a row: only left padding is supported"
        )
    return padding
