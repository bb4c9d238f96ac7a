"""numba `attend_fetch`: attend to what is resident; fetch what is missing, and attend to that."""

from typing import Any

from torch import Tensor

from csrc_free_kernels.cpu.attend import attend
from csrc_free_kernels.cpu.gather import gather
from csrc_free_kernels.reference.attend_fetch import attend_late


def attend_fetch(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_ids: Tensor,
    hit_slots: Tensor,
    late_slots: Tensor,
    seq_lens: Tensor,
    load_src: Tensor,
    load_dst: Tensor,
    load_at: Tensor,
    load_count: Tensor,
    host_blocks: Tensor,
    pool_blocks: Tensor,
    loaded_total: Tensor,
    splits: int,
    out_parts: Tensor,
    lse_parts: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
    bias_pool: Tensor | None = None,
    bias_scale: float = 1.0,
) -> None:
    """Attend to the hits, copy the listed blocks to their slots, attend to them; `merge` joins the parts.

    Arguments as in `csrc_free_kernels/reference/attend_fetch.py`.
    """
    logits: dict[str, Any] = {"softmax_scale": softmax_scale, "soft_cap": soft_cap, "window": window}
    logits |= {"bias_pool": bias_pool, "bias_scale": bias_scale}
    hits, late = (out_parts[:splits], lse_parts[:splits]), (out_parts[splits:], lse_parts[splits:])
    attend(q, k_pool, v_pool, block_ids, hit_slots, seq_lens, *hits, **logits)
    gather(load_src, load_dst, load_count, host_blocks, pool_blocks, loaded_total)
    attend_late(attend, q, k_pool, v_pool, block_ids, late_slots, seq_lens, *late, logits)
