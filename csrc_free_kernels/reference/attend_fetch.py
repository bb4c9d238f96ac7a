"""Truth of `attend_fetch`: attend to what is resident; fetch what is missing, and attend to that."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csrc_free_kernels.reference.attend import attend
from csrc_free_kernels.reference.gather import gather
from csrc_free_kernels.reference.merge import blocks_per_part, late_parts_of


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

    Means what `attend` over the hits, `gather`, and `attend` over the late blocks mean.

    Args:
        q: [B, Hq, D], any float dtype.
        k_pool, v_pool: [L, C, D], the keys and values in `pool_blocks`.
        block_ids: int32 [B, Hkv, S], the selected blocks.
        hit_slots, late_slots: int32 [B, Hkv, S], the slot of a block that is resident, and of one that is loaded now,
            else -1.
        seq_lens: int32 [B], tokens; 0 = the row has no keys.
        load_src, load_dst, load_at, load_count: the load list, as `resolve` writes it.
        host_blocks: [P, Hkv, E], host memory, a block contiguous.
        pool_blocks: [L, E], written in place.
        loaded_total: int64 [1], grows by `load_count`.
        splits: parts of the hits: entry s goes to part `s % splits`. Each is written.
        out_parts, lse_parts: fp32 (fp64 for fp64 inputs) [T, B, Hq, D] and [T, B, Hq], T > splits. The r-th of a (row,
            KV head)'s loads goes to part `splits + r // g`, g the smallest number with which the T - splits parts
            suffice for S blocks; a part that has no load may hold anything afterwards.
        softmax_scale, soft_cap, window, bias_pool, bias_scale: as for `attend`; the bias lies in `pool_blocks` too.
    """
    logits: dict[str, Any] = {"softmax_scale": softmax_scale, "soft_cap": soft_cap, "window": window}
    logits |= {"bias_pool": bias_pool, "bias_scale": bias_scale}
    hits, late = (out_parts[:splits], lse_parts[:splits]), (out_parts[splits:], lse_parts[splits:])
    attend(q, k_pool, v_pool, block_ids, hit_slots, seq_lens, *hits, **logits)
    gather(load_src, load_dst, load_count, host_blocks, pool_blocks, loaded_total)
    attend_late(attend, q, k_pool, v_pool, block_ids, late_slots, seq_lens, *late, logits)


def attend_late(
    attend: Callable[..., None],
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    block_ids: Tensor,
    late_slots: Tensor,
    seq_lens: Tensor,
    out_parts: Tensor,
    lse_parts: Tensor,
    logits: dict[str, Any],
) -> None:
    """Attend to what was loaded, by a home's own `attend`; the parts are those of the loads alone."""
    per_part = blocks_per_part(late_slots.shape[2], len(out_parts))
    by_rank = torch.argsort((late_slots < 0).int(), dim=-1, stable=True)  # those that were loaded come first
    for i in range(int(late_parts_of(late_slots, len(out_parts)).max())):
        mine = by_rank[..., i * per_part : (i + 1) * per_part]
        ids, slots = block_ids.gather(-1, mine), late_slots.gather(-1, mine)
        attend(q, k_pool, v_pool, ids, slots, seq_lens, out_parts[i : i + 1], lse_parts[i : i + 1], **logits)
