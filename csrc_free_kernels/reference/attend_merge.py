"""Truth of `attend_merge`: the last parts of a step's attention, and the merge of all."""

from torch import Tensor

from csrc_free_kernels.reference.attend import attend
from csrc_free_kernels.reference.merge import merge


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

    Means what `attend` into the parts from `first_part` on and then `merge` of all parts mean.

    Args:
        q: [B, Hq, D], any float dtype.
        k_pool: [L, C, D], the dtype of q. Slots that are not named may hold anything.
        v_pool: [L, C, D].
        block_ids: int32 [B, Hkv, S], logical block ids, which fix the token positions.
        block_slots: int32 [B, Hkv, S], -1 = leave this entry out.
        seq_lens: int32 [B], tokens; 0 = the row has no keys.
        first_part: parts before this one were written by `attend`; the T - first_part others are scratch, which
            hold anything afterwards.
        out_parts: fp32 (fp64 for fp64 inputs) [T, B, Hq, D].
        lse_parts: [T, B, Hq], natural log.
        arrivals: int32 [B, Hkv], zero before and after; for the Triton home, else None.
        sinks: [Hq] or None: an extra logit a head that takes weight but has no value.
        out: [B, Hq, D] in the model's dtype; 0 where there are no keys.
        lse: [B, Hq] or None to skip; of the keys alone, without the sink; -inf where there are none.
        softmax_scale: factor on q.k.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap).
        window: None, or only the last `window` tokens count.
    """
    attend(
        q, k_pool, v_pool, block_ids, block_slots, seq_lens, out_parts[first_part:], lse_parts[first_part:],
        softmax_scale=softmax_scale, soft_cap=soft_cap, window=window,
    )  # fmt: skip
    merge(out_parts, lse_parts, sinks, out, lse)
