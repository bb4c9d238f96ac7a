"""Truth of `sample_greedy`: the largest logit of every row, and which rows cannot be sampled at all."""

import torch
from torch import Tensor

MAX_VOCABULARY = 262144
# int64 words of workspace a row: 64 for the parts of a row, 64 for their masses, then 16 levels of 16 sums.
SCRATCH_WORDS = 384


def sample_greedy(logits: Tensor, scratch: Tensor | None, tokens: Tensor, bad: Tensor) -> None:
    """Take the most likely token of every row, ties to the lowest id.

    Args:
        logits: [B, V], any float dtype, rows may be strided. Computed on as fp32.
        scratch: not used here (Triton: int64 [>= B, SCRATCH_WORDS]).
        tokens: int64 [B], written in full; 0 for a row with NaN, with +inf or without a finite logit.
        bad: int32 [B], set to 1 for such a row and left alone otherwise.
    """
    x = logits.float()
    broken = broken_rows(x)
    tokens.copy_(torch.where(broken, 0, x.argmax(-1)))
    bad |= broken


def broken_rows(x: Tensor) -> Tensor:
    """Mark the rows of [B, V] that hold NaN or +inf, or nothing finite."""
    return ~(x < torch.inf).all(-1) | (x == -torch.inf).all(-1)


def check_logits(logits: Tensor) -> None:
    """Raise ValueError for logits that the kernels do not take."""
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits must be [B, V] with V up to {MAX_VOCABULARY}, not {list(logits.shape)}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("the last dim of logits must be contiguous")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be float32, bfloat16 or float16, not {logits.dtype}")
