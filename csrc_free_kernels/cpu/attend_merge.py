"""numba `attend_merge`: the last parts of a step's attention, and the merge of all."""

from torch import Tensor

from csrc_free_kernels.cpu.attend import attend
from csrc_free_kernels.cpu.merge import merge


def attend_merge(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_ids: Tensor,
    block_slots: Tensor,
    seq_lens: Tensor,
    first_part: int,
    out_parts: Tensor,
    lse_parts: Tensor,
    arrivals: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
) -> None:
    """Attend to the blocks that have a slot, then merge all parts, also those written before.

    Arguments as in `csrc_free_kernels/reference/attend_merge.py`; `arrivals` is not used.
    """
    attend(
        q, k_pool, v_pool, block_ids, block_slots, seq_lens, out_parts[first_part:], lse_parts[first_part:],
        softmax_scale=softmax_scale, soft_cap=soft_cap, window=window,
    )  # fmt: skip
    merge(out_parts, lse_parts, sinks, out, lse)
