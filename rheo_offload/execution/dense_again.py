"""Dense attention of one row's newest token, after a step has stored it: the layers of the audit's second forward.

The token's own key and value come from that forward, whose layers below attended to everything, and not from the store,
where the sparse forward put its own. So nothing is written: the history is attended to without the token, which is then
added by its logit.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rheo_offload.cache.device_pool import SlidingLayer
from rheo_offload.execution.dense_rounds import attend_everything
from rheo_offload.types import AttentionCall

if TYPE_CHECKING:
    from rheo_offload.execution.executor import Executor


def attend_again(ex: "Executor", layer_idx: int, call: AttentionCall, row: slice, rows: int) -> torch.Tensor:
    """Attend to the stored history of a row and to the token in `call`. Writes to no pool, store, table or clock.

    Args:
        ex: the executor; its step has run, over the first `rows` rows.
        layer_idx: which layer.
        call: q [1, Hq, 1, D], k and v [1, Hkv, 1, D] of the token.
        row: the row, a slice of one.
        rows: rows of the step.

    Returns:
        [1, Hq, 1, D] in q's dtype.
    """
    history = (ex.cache.step_lens[row] - 1).clamp(min=0)
    alone = replace(call, sinks=None)
    if layer_idx in ex.cache.full:
        layer = ex.cache.full[layer_idx].view(row)
        out, lse = attend_everything(ex, layer, alone, row, purpose="audited", lens=history)
    else:
        out, lse = _attend_ring(ex, ex.cache.sliding[layer_idx], alone, row, rows, history)
    return _with_token(call, out, lse)[:, :, None]


def _attend_ring(
    ex: "Executor", layer: SlidingLayer, call: AttentionCall, row: slice, rows: int, history: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the window of a sliding layer but for its last token: out [1, Hq, D] and lse [1, Hq]."""
    ws, window = ex.ring_workspace_of(layer, rows), layer.spec.window
    assert window is not None
    q = call.q[:, :, 0].contiguous()
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    parts = ws.out_parts[:, row].contiguous(), ws.lse_parts[:, row].contiguous()
    ex.ops.attend(
        q, layer.k_pool, layer.v_pool, ws.block_ids[row], ws.block_slots[row],
        history if window > 1 else torch.zeros_like(history), *parts,
        softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, window=max(1, window - 1),
    )  # fmt: skip
    ex.ops.merge(*parts, None, out, lse)
    return out, lse


def _with_token(call: AttentionCall, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Add the call's own token, and the sinks, to attention over its history: [1, Hq, D]."""
    groups = call.q.shape[1] // call.k.shape[1]
    k, v = (t[:, :, 0].float().repeat_interleave(groups, 1) for t in (call.k, call.v))
    logit = (call.q[:, :, 0].float() * k).sum(-1) * call.softmax_scale  # [1, Hq]
    if call.soft_cap is not None:
        logit = call.soft_cap * torch.tanh(logit / call.soft_cap)
    if call.bias_scale is not None and call.bias is not None:
        logit = logit + call.bias[:, :, 0].float().repeat_interleave(groups, 1) * call.bias_scale
    total = torch.logaddexp(lse, logit)
    if call.sinks is not None:
        total = torch.logaddexp(total, call.sinks.float())
    merged = out.float() * torch.exp(lse - total)[..., None] + v * torch.exp(logit - total)[..., None]
    return merged.to(out.dtype)
