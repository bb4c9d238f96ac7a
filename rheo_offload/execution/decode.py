"""One decode step of one layer. The same function runs eagerly, on any device, and under CUDA-graph capture.

    append -> score -> select -> resolve -> ( gather || attend hits ) -> attend misses -> merge

Eight launches. Nothing here waits for the device, reads a device value or depends on one: lengths, tables and
counts are tensors, and what the host decides (pages, lengths) it decides between steps.
"""

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
    policy, selector = ex.policy_of(layer), ex.selector_of(layer)
    ws = ex.workspace_of(layer)
    q = call.q[:, :, 0]
    tables = (layer.slot_of, layer.block_in, layer.last_used, layer.slot_base, layer.slot_count, cache.step)

    with ex.region("append"):
        ops.append(
            call.k[:, :, 0], call.v[:, :, 0], cache.seq_lens, cache.host_table,
            layer.k_host, layer.v_host, layer.k_pool, layer.v_pool,
            *tables, layer.summary, ws.load_count,
            sink_blocks=cache.sink_blocks, summary_kind=layer.summary_kind,
        )  # fmt: skip
    if ex.is_streamed(layer):
        return attend_everything(ex, layer, call, purpose="streamed")[0]

    with ex.region("score"):
        selector.score(
            ops, q, layer.summary, cache.host_table, cache.seq_lens,
            ws.logits, ws.arrivals, ws.block_scores,
            softmax_scale=call.softmax_scale, block_size=cache.block_size,
        )  # fmt: skip
    with ex.region("select"):
        ops.select(
            ws.block_scores if selector.query_aware else None,
            layer.heat if selector.query_aware else None,
            cache.seq_lens, ws.selected_blocks, ws.num_selected,
            block_size=cache.block_size, sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks,
            query_blocks=policy.query_blocks, agnostic_blocks=policy.agnostic_blocks,
            heat_decay=policy.heat_decay, normalise=selector.normalise,
        )  # fmt: skip
    with ex.region("resolve"):
        ops.resolve(
            ws.selected_blocks, ws.num_selected, cache.seq_lens, cache.host_table,
            *tables, ws.hit_slots, ws.miss_slots, ws.load_src, ws.load_dst, ws.load_count, layer.counters,
            block_size=cache.block_size, sink_blocks=policy.sink_blocks, recent_blocks=policy.recent_blocks,
        )  # fmt: skip

    def gather() -> None:
        with ex.region("gather"):
            ops.gather(
                ws.load_src, ws.load_dst, ws.load_count,
                layer.host_blocks, layer.pool_blocks, layer.traffic_of("loaded"),
            )  # fmt: skip

    def attend(slots: torch.Tensor, parts: slice) -> None:
        ops.attend(
            q, layer.k_pool, layer.v_pool, ws.selected_blocks, slots, cache.seq_lens,
            ws.out_parts[parts], ws.lse_parts[parts],
            softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=None,
        )  # fmt: skip

    ex.gather.start(gather)
    with ex.region("attend"):
        attend(ws.hit_slots, slice(0, ws.hit_splits))
    ex.gather.wait()
    with ex.region("attend"):
        attend(ws.miss_slots, slice(ws.hit_splits, None))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with ex.region("merge"):
        ops.merge(ws.out_parts, ws.lse_parts, call.sinks, out, ws.lse)
    if ex.audit_now:
        ex.audit.record(layer, ws.lse, attend_everything(ex, layer, call, purpose="audited")[1])
    return out


def decode_sliding(ex: "Executor", layer: SlidingLayer, call: AttentionCall) -> torch.Tensor:
    """Attend one new token per row over the ring of a sliding-window layer.

    Args and result as `decode_full`.
    """
    cache, ops, ws = ex.cache, ex.ops, ex.ring_workspace_of(layer)
    q = call.q[:, :, 0]
    ops.ring_append(call.k, call.v, ex.decode_start, layer.k_ring, layer.v_ring)
    ops.attend(
        q, layer.k_pool, layer.v_pool, ws.block_ids, ws.block_slots, cache.seq_lens, ws.out_parts, ws.lse_parts,
        softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=layer.spec.window,
    )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    ops.merge(ws.out_parts, ws.lse_parts, call.sinks, out, None)
    return out
