"""numba `sample_greedy`: the largest logit of every row in one pass."""

import numba as nb
import numpy as np
from torch import Tensor

from csrc_free_kernels.cpu.bits import as_numpy, code_of, decode
from csrc_free_kernels.reference.sample_greedy import check_logits


@nb.njit(cache=True)
def argmax_of(row, code):
    """Id of the largest logit of a row, the lowest of equals; -1: NaN, +inf or nothing finite."""
    best, top = -1, np.float32(-np.inf)
    for i in range(row.size):
        x = decode(row[i], code)
        if not x < np.float32(np.inf):
            return -1
        if x > top:
            best, top = i, x
    return best


# One row an iteration. logits [B, V] as float32 or 16-bit patterns.
@nb.njit(cache=True, parallel=True)
def greedy_kernel(logits, code, tokens, bad):
    for b in nb.prange(logits.shape[0]):
        best = argmax_of(logits[b], code)
        tokens[b] = max(best, 0)
        if best < 0:
            bad[b] = 1


def sample_greedy(logits: Tensor, scratch: Tensor | None, tokens: Tensor, bad: Tensor) -> None:
    """Take the most likely token of every row, ties to the lowest id.

    Arguments as in `csrc_free_kernels/reference/sample_greedy.py`; `scratch` is not used.

    Raises:
        ValueError: logits of another shape or dtype, or with a strided last dim.
    """
    check_logits(logits)
    greedy_kernel(as_numpy(logits), code_of(logits), tokens.numpy(), bad.numpy())
