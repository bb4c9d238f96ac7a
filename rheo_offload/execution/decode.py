"""One decode step of one layer. The same function runs eagerly, on any device, and under CUDA-graph capture.

    append -> decide (score, select, resolve) -> attend_fetch (attend hits || load and attend misses) -> merge

Four launches; with `selection.index` one more ahead of `decide`, with `selection.remainder` one ahead of
`attend_fetch`. Nothing here waits for the device, reads a device value or depends on one: lengths, tables and counts
are tensors, and what the host decides (pages, lengths) it decides between steps. The step covers the first rows of the
cache, as many as the forward has; a row whose length in this step is 0 reads and writes nothing.
"""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from rheo_offload.cache.device_pool import FullLayer, SlidingLayer
from rheo_offload.cache.kv_cache import StepTables
from rheo_offload.execution import token_bias
from rheo_offload.execution.attention_heat import fold_attention
from rheo_offload.execution.dense_rounds import attend_everything
from rheo_offload.execution.refine import attend_tokens
from rheo_offload.execution.summaries import summarize_tails
from rheo_offload.execution.workspace import DecodeWorkspace
from rheo_offload.selection.index import Groups
from rheo_offload.selection.learned_bias import LearnedBias, keeps_heat
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
    ws, heat_rule = ex.workspace_of(layer), ex.attention_heat_of(layer)
    q = call.q[:, :, 0]
    tables = (layer.slot_of, layer.block_in, layer.last_used, layer.slot_base, layer.slot_count, now.step)

    with ex.region("append"):
        ops.append(
            call.k[:, :, 0], call.v[:, :, 0], now.lens, now.host_table,
            layer.k_host, layer.v_host, layer.k_pool, layer.v_pool,
            *tables, layer.op_summary, ws.load_count,
            sink_blocks=cache.sink_blocks, summary_kind=layer.op_summary_kind, value_summary=layer.value_summary,
            **token_bias.for_append(layer, call),
        )  # fmt: skip
        if layer.summary_kind == "own":
            summarize_tails(ex, layer, now)
    if ex.is_streamed(layer):
        return attend_everything(ex, layer, call, rows, purpose="streamed")[0]

    _choose(ex, layer, rows, ws, q, call.softmax_scale)
    if ex.observer is not None and not ex.is_dense(layer):
        ex.observer.note(layer, ws)

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    token_rule = ex.token_rule_of(layer)
    if token_rule is not None:
        with ex.region("gather"):
            ops.gather(
                ws.load_src, ws.load_dst, ws.load_count,
                layer.host_blocks, layer.pool_blocks, layer.traffic_of("loaded"),
            )  # fmt: skip
        with ex.region("refine"):
            attend_tokens(ex, layer, call, ws, now.lens, token_rule, out)
    else:
        _attend_blocks(ex, layer, call, ws, now, out)
    if heat_rule is not None:
        with ex.region("heat"):
            fold_attention(ex, layer, call, ws, now.lens, heat_rule)
    if ex.audit_now:
        _audit(ex, layer, call, ws.lse_of_selected(), out)
    return out


def _choose(
    ex: "Executor", layer: FullLayer, rows: slice, ws: DecodeWorkspace, q: torch.Tensor, softmax_scale: float
) -> None:
    """Fill the workspace's lists: what is selected, hits, misses, what must be loaded."""
    ops, now, size = ex.ops, ex.cache.tables(rows), ex.cache.block_size
    policy, selector = ex.policy_of(layer), ex.selector_of(layer)
    tables = (layer.slot_of, layer.block_in, layer.last_used, layer.slot_base, layer.slot_count, now.step)
    loads = (ws.load_src, ws.load_dst, ws.load_at, ws.load_count)
    found = (ws.hit_slots, ws.miss_slots, *loads, layer.counters)
    forced = dict(sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks)
    if ex.source_of(layer) is not None:
        with ex.region("decide"):
            ops.resolve(
                ws.selected_blocks, ws.num_selected, now.lens, now.host_table, *tables, *found,
                block_size=size, **forced,
            )  # fmt: skip
        return
    if isinstance(selector, LearnedBias):
        with ex.region("rank"):
            ops.rank_bias(
                now.lens, now.host_table, layer.slot_of, layer.bias_pool, layer.unit_bias, layer.heat,
                block_size=size, pooling=selector.pooling,
            )  # fmt: skip
    if selector.score_kind == "given":
        with ex.region("score"):
            selector.score(
                ops, q, layer.summary, now.host_table, ex.scored_lens(rows), ws.logits, ws.arrivals, ws.block_scores,
                softmax_scale=softmax_scale, block_size=size,
            )  # fmt: skip
    due = None if ex.is_dense(layer) else ex.due(rows)
    with ex.region("decide"):
        opened = {} if ws.groups is None else _open_groups(ex, layer, ws, ws.groups, q, now, due)
        ops.decide(
            q, layer.summary, layer.heat if keeps_heat(selector) else None, now.lens, now.host_table,
            *tables, ws.logits, ws.arrivals, ws.block_scores if selector.score_kind != "none" else None,
            ws.selected_blocks, ws.num_selected, *found,
            score=selector.score_kind, softmax_scale=softmax_scale, block_size=size, **forced,
            query_blocks=policy.query_blocks, agnostic_blocks=policy.agnostic_blocks,
            heat_decay=policy.heat_decay, normalise="none" if ex.attention_heat_of(layer) else selector.normalise,
            rule=policy.rule, limit=policy.limit, due=due, **opened,
        )  # fmt: skip


def _open_groups(
    ex: "Executor",
    layer: FullLayer,
    ws: DecodeWorkspace,
    groups: Groups,
    q: torch.Tensor,
    now: StepTables,
    due: torch.Tensor | None,
) -> dict[str, Any]:
    """List the groups whose blocks are to be ranked; returns them as `decide` takes them."""
    ex.ops.open_groups(
        q, layer.group_bounds, layer.summary, layer.heat, now.host_table, now.lens, ws.arrivals, ws.group_scores,
        ws.open_groups, ws.num_open, block_size=ex.cache.block_size, **asdict(groups), due=due,
    )  # fmt: skip
    return dict(open_groups=ws.open_groups, num_open=ws.num_open, group_blocks=groups.group_blocks)


def _attend_blocks(
    ex: "Executor",
    layer: FullLayer,
    call: AttentionCall,
    ws: DecodeWorkspace,
    now: StepTables,
    out: torch.Tensor,
) -> None:
    """Attend to the selected blocks, while the missing ones come, and merge into `out` [B, Hq, D]."""
    ops, q, cache = ex.ops, call.q[:, :, 0], ex.cache
    logits = dict(softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=None)
    logits |= token_bias.for_logits(call, layer.bias_pool)
    pool = (layer.k_pool, layer.v_pool, ws.selected_blocks)
    blocks = (layer.host_blocks, layer.pool_blocks, layer.traffic_of("loaded"))
    early = ws.estimate_splits + ws.hit_splits  # parts that there always are
    if layer.value_summary is not None:
        with ex.region("estimate"):
            ops.attend_centroids(
                q, layer.summary, layer.value_summary, now.host_table, now.lens, ws.selected_blocks, *ws.estimated,
                softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, block_size=cache.block_size,
            )  # fmt: skip
    if ex.overlap:
        with ex.region("attend"):
            ops.attend_fetch(
                q, *pool, ws.hit_slots, ws.miss_slots, now.lens,
                ws.load_src, ws.load_dst, ws.load_at, ws.load_count, *blocks, ws.hit_splits, *ws.attended, **logits,
            )  # fmt: skip
        with ex.region("merge"):
            ops.merge(
                ws.out_parts, ws.lse_parts, call.sinks, out, ws.lse, splits=early, late_slots=ws.miss_slots
            )
        return
    # as systems do that fetch, then attend: for comparison
    with ex.region("gather"):
        ops.gather(ws.load_src, ws.load_dst, ws.load_count, *blocks)
    hits = [parts[: ws.hit_splits] for parts in ws.attended]
    with ex.region("attend"):
        ops.attend(q, *pool, torch.maximum(ws.hit_slots, ws.miss_slots), now.lens, *hits, **logits)
    with ex.region("merge"):
        ops.merge(ws.out_parts[:early], ws.lse_parts[:early], call.sinks, out, ws.lse)


def _audit(
    ex: "Executor", layer: FullLayer, call: AttentionCall, lse: torch.Tensor, out: torch.Tensor
) -> None:
    """Attend to everything for one row, and note what share of it the selection captured and how far `out` is off."""
    row = ex.audit.row(layer.rows)
    alone = ex.cache.full[layer.spec.layer_idx].view(row)
    everything = replace(call, q=call.q[row], k=call.k[row], v=call.v[row])  # the bias is read from the cache
    dense, lse_all = attend_everything(ex, alone, everything, row, purpose="audited")
    ex.audit.record(alone, lse[row], lse_all, out[row], dense)


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
