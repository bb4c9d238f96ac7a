"""One decode step of one layer. The same function runs eagerly, on any device, and under CUDA-graph capture.

    append -> decide (score, select, resolve) -> attend_fetch (attend hits || load and attend misses) -> merge

Four launches. Nothing here waits for the device, reads a device value or depends on one: lengths, tables and
counts are tensors, and what the host decides (pages, lengths) it decides between steps. The step covers the first
rows of the cache, as many as the forward has; a row whose length in this step is 0 reads and writes nothing.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rheo_offload.cache.device_pool import FullLayer, SlidingLayer
from rheo_offload.execution.dense_rounds import attend_everything
from rheo_offload.types import AttentionCall

if TYPE_CHECKING:
    from rheo_offload.execution.executor import Executor


def decode_full(ex: "Executor", layer: FullLayer, call: AttentionCall) -> torch.Tensor:
    """Attend one new token per row over the selected blocks of an offloaded layer.

    Args:
        ex: the executor; its clock already counts this token.
        layer: the layer's state, updated in place.
        call: q [B, Hq, 1, D], k and v [B, Hkv, 1, D].

    Returns:
        [B, Hq, D] in q's dtype. Inactive rows are 0.
    """
    cache, ops = ex.cache, ex.ops
    rows = slice(0, call.q.shape[0])
    layer, now = layer.view(rows), cache.tables(rows)
    policy, selector = ex.policy_of(layer), ex.selector_of(layer)
    ws = ex.workspace_of(layer)
    q = call.q[:, :, 0]
    tables = (layer.slot_of, layer.block_in, layer.last_used, layer.slot_base, layer.slot_count, now.step)

    with ex.region("append"):
        ops.append(
            call.k[:, :, 0], call.v[:, :, 0], now.lens, now.host_table,
            layer.k_host, layer.v_host, layer.k_pool, layer.v_pool,
            *tables, layer.summary, ws.load_count,
            sink_blocks=cache.sink_blocks, summary_kind=layer.summary_kind,
        )  # fmt: skip
    if ex.is_streamed(layer):
        return attend_everything(ex, layer, call, rows, purpose="streamed")[0]

    if selector.score_kind == "given":
        with ex.region("score"):
            selector.score(
                ops, q, layer.summary, now.host_table, now.lens, ws.logits, ws.arrivals, ws.block_scores,
                softmax_scale=call.softmax_scale, block_size=cache.block_size,
            )  # fmt: skip
    with ex.region("decide"):
        ops.decide(
            q, layer.summary, layer.heat if selector.query_aware else None, now.lens, now.host_table,
            *tables, ws.logits, ws.arrivals, ws.block_scores if selector.query_aware else None,
            ws.selected_blocks, ws.num_selected, ws.hit_slots, ws.miss_slots,
            ws.load_src, ws.load_dst, ws.load_at, ws.load_count, layer.counters,
            score=selector.score_kind, softmax_scale=call.softmax_scale, block_size=cache.block_size,
            sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks,
            query_blocks=policy.query_blocks, agnostic_blocks=policy.agnostic_blocks,
            heat_decay=policy.heat_decay, normalise=selector.normalise,
        )  # fmt: skip
    if ex.observer is not None and selector is ex.selector:
        ex.observer.note(layer, ws)

    logits = dict(softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=None)
    pool, parts = (layer.k_pool, layer.v_pool, ws.selected_blocks), (ws.out_parts, ws.lse_parts)
    loads = (ws.load_src, ws.load_dst, ws.load_at, ws.load_count)
    blocks = (layer.host_blocks, layer.pool_blocks, layer.traffic_of("loaded"))
    late = {"splits": ws.hit_splits, "late_slots": ws.miss_slots}
    if ex.overlap:
        with ex.region("attend"):
            ops.attend_fetch(
                q,
                *pool,
                ws.hit_slots,
                ws.miss_slots,
                now.lens,
                *loads,
                *blocks,
                ws.hit_splits,
                *parts,
                **logits,
            )
    else:  # as systems do that fetch, then attend: for comparison
        with ex.region("gather"):
            ops.gather(ws.load_src, ws.load_dst, ws.load_count, *blocks)
        parts, late = (ws.out_parts[: ws.hit_splits], ws.lse_parts[: ws.hit_splits]), {}
        with ex.region("attend"):
            ops.attend(q, *pool, torch.maximum(ws.hit_slots, ws.miss_slots), now.lens, *parts, **logits)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with ex.region("merge"):
        ops.merge(*parts, call.sinks, out, ws.lse, **late)
    if ex.audit_now:
        _audit(ex, layer, call, out, ws.lse)
    return out


def _audit(
    ex: "Executor", layer: FullLayer, call: AttentionCall, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Attend to everything for one row, and note what share of it the selection captured."""
    row = ex.audit.row(layer.rows)
    alone = ex.cache.full[layer.spec.layer_idx].view(row)
    everything = replace(call, q=call.q[row], k=call.k[row], v=call.v[row])
    out_all, lse_all = attend_everything(ex, alone, everything, row, purpose="audited")
    ex.audit.record(alone, lse[row], lse_all, out[row], out_all)


def decode_sliding(ex: "Executor", layer: SlidingLayer, call: AttentionCall) -> torch.Tensor:
    """Attend one new token per row over the ring of a sliding-window layer.

    Args and result as `decode_full`.
    """
    rows = slice(0, call.q.shape[0])
    ops, ws = ex.ops, ex.ring_workspace_of(layer, call.q.shape[0])
    q = call.q[:, :, 0]
    ops.ring_append(call.k, call.v, ex.decode_start[rows], layer.k_ring[rows], layer.v_ring[rows])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    ops.attend(
        q, layer.k_pool, layer.v_pool, ws.block_ids, ws.block_slots, ex.cache.step_lens[rows],
        ws.out_parts, ws.lse_parts,
        softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=layer.spec.window,
    )  # fmt: skip
    ops.merge(ws.out_parts, ws.lse_parts, call.sinks, out, None)
    return out
