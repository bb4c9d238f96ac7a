"""Dense attention of one token per row over a history beyond the pool: staged in rounds, merged by log-sum-exp.

Serves layers kept dense (`selection.dense_layers`, method `full`) and the audit of what the selection captured.
"""

from typing import TYPE_CHECKING

import torch

from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.execution.token_bias import for_logits
from rheo_offload.types import AttentionCall

if TYPE_CHECKING:
    from rheo_offload.execution.executor import Executor


def attend_everything(
    ex: "Executor",
    layer: FullLayer,
    call: AttentionCall,
    rows: slice,
    *,
    purpose: str,
    lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to every block of every row, round by round through the staging buffer.

    The number of rounds follows the longest row the tables can hold, so the loop is the same at every step.

    Args:
        ex: the executor.
        layer: the layer as `rows` see it; this step's token is already appended.
        call: q [B, Hq, 1, D] of those rows.
        rows: which rows of the cache they are.
        lens: int32 [B], tokens of each row to attend to; None: as many as the step counts.
        purpose: under which name of `TRAFFIC` the blocks read from the host are counted.

    Returns:
        out [B, Hq, D] in q's dtype and lse [B, Hq] fp32 (without sinks).
    """
    ops, ws = ex.ops, ex.rounds_workspace_of(layer)
    now = ex.cache.tables(rows)
    lens = now.lens if lens is None else lens
    q = call.q[:, :, 0]
    k, v = layer.layout.split(ws.staging.flatten(0, 2))
    bias = for_logits(call, layer.layout.bias(ws.staging.flatten(0, 2)))
    for part, first in enumerate(ws.firsts):
        ops.stage(
            first, lens, now.host_table, layer.slot_of, layer.host_blocks, layer.pool_blocks,
            ws.staging, layer.traffic_of(purpose), block_size=ex.cache.block_size,
        )  # fmt: skip
        # blocks beyond a row's end stay in the list: no position of theirs is below seq_len
        ops.attend(
            q, k, v, ws.block_ids[part], ws.slots, lens,
            ws.out_parts[part : part + 1], ws.lse_parts[part : part + 1],
            softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=None, **bias,
        )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    ops.merge(ws.out_parts, ws.lse_parts, call.sinks, out, lse)
    return out, lse
