"""Attention to the best tokens of the selected blocks, once these are there: plain torch and the ordinary kernel.

The keys of the selected blocks are scored exactly, the best tokens are copied together into blocks of their own, and
the kernel attends to those; the host does not wait. That reads every selected key once more, holds them in fp32, sorts
the tokens, and leaves no attention for the transfer to hide behind.
"""

from typing import TYPE_CHECKING

import torch

from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.execution.workspace import DecodeWorkspace
from rheo_offload.selection.refined import TokenRule
from rheo_offload.types import AttentionCall, Policy

if TYPE_CHECKING:
    from rheo_offload.execution.executor import Executor


def attend_tokens(
    ex: "Executor",
    layer: FullLayer,
    call: AttentionCall,
    ws: DecodeWorkspace,
    lens: torch.Tensor,
    rule: TokenRule,
    out: torch.Tensor,
) -> None:
    """Attend to the best tokens of the selected blocks, all of which are resident by now.

    Args:
        ex: the executor.
        layer: the layer as the step's rows see it.
        call: of the step.
        ws: holds the selection; its parts are scratch, its `lse` is written.
        lens: int32 [B], this step's lengths; 0 = inactive.
        rule: which tokens.
        out: [B, Hq, D], written.
    """
    size, slots = layer.k_pool.shape[1], torch.maximum(ws.hit_slots, ws.miss_slots)
    index, counts = _best_tokens(call, layer, slots, ws.selected_blocks, lens, rule, ex.policy_of(layer))
    slot = slots.clamp(min=0).long().gather(2, index // size)
    blocks = (*slots.shape[:2], -1, size)
    ids = torch.arange(index.shape[2] // size, dtype=torch.int32, device=slots.device).expand(
        *slots.shape[:2], -1
    )
    own = torch.arange(ids.numel(), dtype=torch.int32, device=slots.device).view(ids.shape)
    k, v = (
        pool[slot, index % size].unflatten(2, blocks[2:]).flatten(0, 2)
        for pool in (layer.k_pool, layer.v_pool)
    )
    parts = [t[: ws.hit_splits] for t in ws.attended]
    ex.ops.attend(
        call.q[:, :, 0], k, v, ids.contiguous(), own, counts, *parts,
        softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=None,
    )  # fmt: skip
    ex.ops.merge(*parts, call.sinks, out, ws.lse)


def _best_tokens(
    call: AttentionCall,
    layer: FullLayer,
    slots: torch.Tensor,
    blocks: torch.Tensor,
    lens: torch.Tensor,
    rule: TokenRule,
    policy: Policy,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank the tokens of the selected blocks `blocks` [B, Hkv, S], which are in `slots`; ties go to the earlier token.

    Returns:
        int64 [B, Hkv, K] places `s * C + c`, the best first, K a multiple of C; and int32 [B], how many of them count
        (the same for every KV head, as all heads of a row select equally many blocks).
    """
    size = layer.k_pool.shape[1]
    keys = layer.k_pool[slots.clamp(min=0).long()].float().flatten(2, 3)  # [B, Hkv, S * C, D]
    q = call.q[:, :, 0].float().unflatten(1, (slots.shape[1], -1))
    logits = call.softmax_scale * torch.einsum("bhgd,bhnd->bhgn", q, keys)
    if call.soft_cap is not None:
        logits = call.soft_cap * torch.tanh(logits / call.soft_cap)

    length = lens[:, None, None]
    position = blocks[..., None] * size + torch.arange(size, dtype=torch.int32, device=slots.device)
    seen = ((slots >= 0)[..., None] & (position < length[..., None])).flatten(2)
    first_recent = (length + size - 1) // size - policy.recent_blocks
    forced = (blocks < policy.sink_blocks) | (blocks >= first_recent)
    forced = seen & forced.repeat_interleave(size, 2) if rule.keeps_forced else torch.zeros_like(seen)

    competing = (seen & ~forced)[:, :, None]
    top = logits.masked_fill(~competing, -torch.inf).amax(-1, keepdim=True)
    weights = torch.where(competing, torch.exp(logits - top.clamp(min=torch.finfo(torch.float32).min)), 0.0)
    votes = (weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).sum(2)
    if rule.layer_wide:
        votes = votes.sum(1, keepdim=True).expand_as(votes)
    rank = torch.where(forced, torch.inf, torch.where(seen, votes, -torch.inf))
    room = rule.tokens + (policy.sink_blocks + policy.recent_blocks) * size * rule.keeps_forced
    room = min(-(-room // size) * size, rank.shape[2])
    index = rank.sort(dim=2, descending=True, stable=True).indices[..., :room]
    counts = forced.sum(2) + competing[:, :, 0].sum(2).clamp(max=rule.tokens)
    return index, counts[:, 0].int()
