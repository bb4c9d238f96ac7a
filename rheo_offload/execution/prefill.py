"""A chunk of new tokens on top of what a row already holds: exact dense attention, history streamed from the host.

history   staged block range by block range (from the pool where resident), each folded into (out, lse)
chunk     its own keys, causal
write     keys and values to the host pages (and to slots while there is room), block summaries, heat
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rheo_offload.cache import residency
from rheo_offload.cache.device_pool import FullLayer, SlidingLayer
from rheo_offload.cache.group_bounds import complete_groups
from rheo_offload.execution import token_bias
from rheo_offload.execution.attention_heat import PromptMass
from rheo_offload.execution.summaries import summarize_chunk
from rheo_offload.execution.workspace import SelectionLists
from rheo_offload.selection.base import normalised
from rheo_offload.selection.learned_bias import LearnedBias, keeps_heat
from rheo_offload.types import AttentionCall

if TYPE_CHECKING:
    from rheo_offload.execution.executor import Executor

# (out [B, Hq, Q, D] fp32, lse [B, Hq, Q] fp32): the attention over the keys folded in so far
Partial = tuple[torch.Tensor, torch.Tensor]

# The last queries of a chunk tell which blocks the first decode steps will want.
HEAT_QUERIES = 64


@dataclass(slots=True)
class Chunk:
    """The rows a forward pass covers and where each one's new tokens begin."""

    rows: slice
    before: list[int]
    """Tokens each row held before this chunk."""
    after: list[int]
    start: torch.Tensor
    """int32 [B]: position of the chunk's first token, negative where it is padding."""
    history: torch.Tensor
    """int32 [B]: `before` on the device."""
    lengths: torch.Tensor
    """int32 [B]: `after` on the device."""


def prefill_full(ex: "Executor", layer: FullLayer, call: AttentionCall, chunk: Chunk) -> torch.Tensor:
    """Attend and store a chunk of an offloaded layer.

    Args:
        ex: the executor.
        layer: the layer's state, updated in place for `chunk.rows`.
        call: q [B, Hq, Q, D], k and v [B, Hkv, Q, D] of those rows.
        chunk: where the tokens are.

    Returns:
        [B, Hq, Q, D] in q's dtype; padding is 0.
    """
    cache, ops = ex.cache, ex.ops
    partial = _empty_partial(call.q)
    table, slot_of = cache.host_table[chunk.rows], layer.slot_of[chunk.rows]
    size = cache.block_size
    longest = cache.blocks_of(max(chunk.before))
    starts = ex.wants_heat and ex.starts_from_attention(layer) and not ex.is_streamed(layer)
    mass = PromptMass(call, layer, cache.max_blocks, HEAT_QUERIES) if starts else None
    if longest:
        staging = ex.staging(layer, len(chunk.before))
        k, v = layer.layout.split(staging)
        bias = layer.layout.bias(staging)
        for first in range(0, longest, staging.shape[2]):
            ops.stage(
                first, chunk.history, table, slot_of, layer.host_blocks, layer.pool_blocks,
                staging, layer.traffic_of("prefill"), block_size=size,
            )  # fmt: skip
            tokens = (chunk.history - first * size).clamp(0, staging.shape[2] * size)
            key_start = torch.full_like(chunk.start, first * size)
            _fold(ops, call, k, v, chunk.start, key_start, tokens, partial, bias=bias)
            if mass is not None:
                mass.add_history(k, first, tokens)
    _fold_chunk(ops, call, chunk.start, partial)
    _store(ex, layer, call, chunk)
    if mass is not None:
        mass.add_chunk(chunk.start, size)
        layer.heat[chunk.rows] = mass.heat(partial[1], ex.attention_heat_of(layer))
    elif ex.wants_heat:
        _start_heat(ex, layer, call, chunk)
    return _finish(call, partial)


def _store(ex: "Executor", layer: FullLayer, call: AttentionCall, chunk: Chunk) -> None:
    """Write the chunk's keys and values to host pages and slots, and the summaries of what they complete."""
    cache, ops = ex.cache, ex.ops
    table, slot_of = cache.host_table[chunk.rows], layer.slot_of[chunk.rows]
    for b, row in enumerate(range(chunk.rows.start, chunk.rows.stop)):
        # Only blocks that begin in this chunk: a slot for an older one would miss the tokens it already has.
        residency.claim_in_order(
            layer, row, cache.blocks_of(chunk.before[b]), cache.blocks_of(chunk.after[b])
        )
    ops.append_chunk(
        call.k, call.v, chunk.start, table,
        layer.k_host, layer.v_host, layer.k_pool, layer.v_pool, slot_of,
    )  # fmt: skip
    token_bias.append_chunk(ops, layer, call, chunk, table)
    if layer.summary_kind == "own":
        summarize_chunk(ex, layer, call.k, chunk)
    elif layer.summary_kind != "none":
        ops.summarize_chunk(
            call.k, chunk.start, table, layer.k_host, layer.summary, summary_kind=layer.summary_kind
        )
    for b, row in enumerate(range(chunk.rows.start, chunk.rows.stop)):
        complete_groups(layer, cache.host_table, row, chunk.before[b], chunk.after[b])
    if layer.value_summary is not None:
        ops.summarize_chunk(
            call.v, chunk.start, table, layer.v_host, layer.value_summary, summary_kind="mean"
        )


def prefill_sliding(ex: "Executor", layer: SlidingLayer, call: AttentionCall, chunk: Chunk) -> torch.Tensor:
    """Attend and store a chunk of a sliding-window layer. Args and result as `prefill_full`."""
    partial = _empty_partial(call.q)
    ops, window = ex.ops, layer.spec.window
    assert window is not None
    reach = min(window - 1, max(chunk.before))
    if reach > 0:
        k, v = layer.history(chunk.history, reach, chunk.rows)
        reaches = torch.full_like(chunk.start, reach)
        key_start = chunk.history - reach
        _fold(ops, call, k[:, :, None], v[:, :, None], chunk.start, key_start, reaches, partial, window)
    _fold_chunk(ops, call, chunk.start, partial, window)
    ops.ring_append(call.k, call.v, chunk.start, layer.k_ring[chunk.rows], layer.v_ring[chunk.rows])
    return _finish(call, partial)


def dense_attention(ops: Any, call: AttentionCall, padding: torch.Tensor, window: int | None) -> torch.Tensor:
    """Exact causal attention of a forward pass without a cache; `padding` [B] counts leading padding tokens.

    Returns [B, Hq, Q, D] in q's dtype; padding is 0.
    """
    partial = _empty_partial(call.q)
    _fold_chunk(ops, call, (-padding).int(), partial, window)
    return _finish(call, partial)


def warm(ex: "Executor", rows: slice) -> None:
    """Fill the pools of `rows`: sink, recent and hottest blocks, as many as fit, in one gather per layer."""
    cache, ops = ex.cache, ex.ops
    cache.step += 1  # what was claimed during the prompt is older than what is selected now
    lens, host_table = cache.seq_lens[rows], cache.host_table[rows]
    for whole in cache.full.values():
        layer = whole.view(rows)
        selector, policy, heat = ex.selector_of(layer), ex.policy_of(layer), ex.heat_of(whole)[rows]
        room = min(layer.capacity, layer.max_blocks) - 1
        if ex.is_streamed(layer) or room < policy.sink_blocks + policy.recent_blocks:
            continue
        ws = SelectionLists(layer.rows, layer.spec.num_kv_heads, room, layer.device)
        hot = room - policy.sink_blocks - policy.recent_blocks if keeps_heat(selector) else 0
        limits = dict(
            block_size=cache.block_size, sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks,
            heat_decay=1.0, normalise="none",
        )  # fmt: skip
        if hot and policy.rule == "scored":  # what a head never takes has no heat and is not worth the link
            ops.select(
                heat, None, lens, ws.selected_blocks, ws.num_selected,
                query_blocks=hot, agnostic_blocks=0, rule="threshold", limit=0.0, **limits,
            )  # fmt: skip
        else:
            ops.select(
                None, heat if hot else None, lens, ws.selected_blocks, ws.num_selected,
                query_blocks=0, agnostic_blocks=hot, **limits,
            )  # fmt: skip
        ops.resolve(
            ws.selected_blocks, ws.num_selected, lens, host_table, layer.slot_of, layer.block_in, layer.last_used,
            layer.slot_base, layer.slot_count, cache.step, ws.hit_slots, ws.miss_slots,
            ws.load_src, ws.load_dst, ws.load_at, ws.load_count,
            torch.zeros_like(layer.counters),  # a warm-up is neither hit nor miss
            block_size=cache.block_size, sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks,
        )  # fmt: skip
        ops.gather(
            ws.load_src, ws.load_dst, ws.load_count,
            layer.host_blocks, layer.pool_blocks, layer.traffic_of("warmed"),
        )  # fmt: skip


def _start_heat(ex: "Executor", layer: FullLayer, call: AttentionCall, chunk: Chunk) -> None:
    """Set the heat from the chunk's last queries, folded into the group so that one call averages them."""
    selector, cache = ex.selector_of(layer), ex.cache
    if isinstance(selector, LearnedBias):
        token_bias.rank_prompt(selector, layer, chunk, cache.host_table[chunk.rows])
        return
    if not selector.query_aware or ex.is_streamed(layer) or ex.source_of(layer) is not None:
        return
    q = call.q[:, :, -HEAT_QUERIES:]
    rows, _, queries, dim = q.shape
    folded = q.unflatten(1, (layer.spec.num_kv_heads, -1)).flatten(2, 3).reshape(rows, -1, dim)
    scores = torch.empty(rows, layer.spec.num_kv_heads, cache.max_blocks, device=q.device)
    selector.score(
        ex.reference_ops, folded, layer.summary, cache.host_table[chunk.rows], chunk.lengths, None, None, scores,
        softmax_scale=call.softmax_scale, block_size=cache.block_size,
    )  # fmt: skip
    layer.heat[chunk.rows] = normalised(scores, selector.normalise)


def _empty_partial(q: torch.Tensor) -> Partial:
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    return out, torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)


def _fold_chunk(
    ops: Any, call: AttentionCall, start: torch.Tensor, partial: Partial, window: int | None = None
) -> None:
    """Fold in the chunk's own keys."""
    length = torch.full_like(start, call.k.shape[2])
    bias = None if call.bias is None else call.bias[:, :, None]
    _fold(ops, call, call.k[:, :, None], call.v[:, :, None], start, start, length, partial, window, bias)


def _fold(
    ops: Any,
    call: AttentionCall,
    k: torch.Tensor,
    v: torch.Tensor,
    query_start: torch.Tensor,
    key_start: torch.Tensor,
    key_len: torch.Tensor,
    partial: Partial,
    window: int | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Fold one key segment [B, Hkv, M, C, D], its bias [B, Hkv, M, C], into the partial."""
    ops.prefill_attention(
        call.q, k, v, query_start, key_start, key_len, *partial,
        softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=window,
        **token_bias.for_logits(call, bias, "bias"),
    )  # fmt: skip


def _finish(call: AttentionCall, partial: Partial) -> torch.Tensor:
    """Apply the sinks and cast: with a sink, a partial's weight shrinks by exp(lse - logaddexp(lse, sink))."""
    out, lse = partial
    if call.sinks is not None:
        total = torch.logaddexp(lse, call.sinks.float()[None, :, None])
        out = out * torch.exp(lse - total)[..., None]
    return out.to(call.q.dtype)
