"""Heat that follows what attention really weighed, in place of a method's scores.

A decode step folds in the weights of the blocks it attended to, and the scores of the others; a prompt starts from the
weights of its last queries, over all blocks.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.execution.workspace import DecodeWorkspace
from rheo_offload.selection.base import normalised
from rheo_offload.selection.heat_ranked import AttentionHeat
from rheo_offload.types import AttentionCall

if TYPE_CHECKING:
    from rheo_offload.execution.executor import Executor

PIECE_TOKENS = 2048  # of the history weighed at once: 16 MiB of logits for 32 heads and 64 queries


def fold_attention(
    ex: "Executor",
    layer: FullLayer,
    call: AttentionCall,
    ws: DecodeWorkspace,
    lens: torch.Tensor,
    rule: AttentionHeat,
) -> None:
    """Fold a step's weights (scores, where it did not look) into the heat: device work, always the same.

    Args:
        ex: the executor.
        layer: the layer as the step's rows see it; `heat` is updated in place. Rows that are inactive, or keep an
            earlier selection, are left alone: heat decays once a selection.
        call: of the step.
        ws: holds what was selected, where it is, and the lse of the merged attention.
        lens: int32 [B], this step's lengths; 0 = inactive.
        rule: decay and reach.
    """
    slots = torch.maximum(ws.hit_slots, ws.miss_slots)
    mass = torch.empty(slots.shape, dtype=torch.float32, device=slots.device)
    ex.ops.block_mass(
        call.q[:, :, 0], layer.k_pool, ws.selected_blocks, slots, lens, ws.lse, mass,
        softmax_scale=call.softmax_scale, soft_cap=call.soft_cap,
    )  # fmt: skip
    selector, blocks = ex.selector_of(layer), layer.heat.shape[2]
    scored = selector.score_kind != "none"
    new = normalised(ws.block_scores, selector.normalise) if scored else torch.zeros_like(layer.heat)
    ids = torch.where(
        ws.selected_blocks < 0, blocks, ws.selected_blocks
    ).long()  # padding: one block too many
    new = F.pad(new, (0, 1)).scatter_(2, ids, mass)[..., :blocks]
    if rule.layer_wide:
        new = new.mean(1, keepdim=True).expand_as(new)
    selects = (ex.scored_lens(slice(0, layer.rows)) > 0)[:, None, None]
    layer.heat.copy_(torch.where(selects, rule.decay * layer.heat + new, layer.heat))


class PromptMass:
    """How the last queries of a chunk spread their attention over blocks, gathered segment by segment.

    The weights need the lse over all keys, which is known only at the end; until then the lse of every block is kept.
    """

    def __init__(self, call: AttentionCall, layer: FullLayer, max_blocks: int, queries: int) -> None:
        """Args: queries: how many of the chunk's last queries count."""
        heads = layer.spec.num_kv_heads
        self.call, self.queries = call, min(queries, call.q.shape[2])
        self.q = call.q[:, :, -self.queries :].float().unflatten(1, (heads, -1))  # [B, Hkv, G, W, D]
        shape = (*self.q.shape[:4], max_blocks)
        self.lse = torch.full(shape, -torch.inf, device=call.q.device)  # of every block

    def _logits(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [B, Hkv, n, D] -> [B, Hkv, G, W, n]."""
        logits = self.call.softmax_scale * torch.einsum("bhgwd,bhnd->bhgwn", self.q, keys.float())
        cap = self.call.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def add_history(self, keys: torch.Tensor, first: int, tokens: torch.Tensor) -> None:
        """Fold in blocks `first ..` of the history: keys [B, Hkv, M, C, D], `tokens` [B] of them exist."""
        size = keys.shape[3]
        for piece in keys.split(max(1, PIECE_TOKENS // size), dim=2):
            blocks = piece.shape[2]
            exists = torch.arange(blocks * size, device=keys.device) < tokens[:, None]
            flat = piece.flatten(2, 3).masked_fill(~exists[:, None, :, None], 0)
            logits = self._logits(flat).masked_fill(~exists[:, None, None, None], -torch.inf)
            own = self.lse[..., first : first + blocks]  # fewer at the end of the row
            own.copy_(logits.unflatten(4, (blocks, size)).logsumexp(-1)[..., : own.shape[4]])
            first, tokens = first + blocks, tokens - blocks * size

    def add_chunk(self, start: torch.Tensor, block_size: int) -> None:
        """Fold in the chunk's own keys, causally: token i is at position `start[b] + i`, negative ones are padding."""
        count = self.call.k.shape[2]
        index = torch.arange(count, device=start.device)
        position = start[:, None] + index  # [B, Q]
        seen = (index <= index[-self.queries :, None]) & (position >= 0)[:, None]  # [B, W, Q]
        logits = self._logits(self.call.k).masked_fill(~seen[:, None, None], -torch.inf)
        top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        block = (position.clamp(min=0) // block_size).long()[:, None, None, None].expand_as(logits)
        sums = torch.zeros_like(self.lse).scatter_add_(4, block, torch.exp(logits - top))
        self.lse = torch.logaddexp(self.lse, sums.log() + top)

    def heat(self, lse: torch.Tensor, rule: AttentionHeat | None) -> torch.Tensor:
        """Return the heat [B, Hkv, N] as if the queries had been decode steps; without a rule, their mean weights.

        Args:
            lse: [B, Hq, Q] over all keys of every query of the chunk.
            rule: how a decode step's weights enter the heat.
        """
        total = lse[:, :, -self.queries :].unflatten(1, (self.q.shape[1], -1))[..., None]  # [B, Hkv, G, W, 1]
        real = total > -torch.inf  # padding attends to nothing
        weights = torch.where(real, torch.exp(self.lse - total.masked_fill(~real, 0.0)), 0.0).mean(
            2
        )  # [B, Hkv, W, N]
        if rule is None:
            return weights.sum(2) / real.all(2).sum(2).clamp(min=1)
        age = torch.arange(self.queries - 1, -1, -1, device=lse.device)
        mass = torch.einsum("bhwn,w->bhn", weights, rule.decay**age)
        return mass.mean(1, keepdim=True).expand_as(mass) if rule.layer_wide else mass
