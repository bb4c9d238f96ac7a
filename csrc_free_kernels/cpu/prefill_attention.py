"""Attention of a chunk of queries over one segment of keys, folded into a running result.

Two matrix products a tile dominate, so this is BLAS in fp32 with the softmax in place between them. The
tiling is FlashAttention-2's (arXiv:2307.08691); a group's query heads are stacked so that they share keys.
"""

import torch
from torch import Tensor

# Tiles of logits, 1 MiB: rows are queries times the heads of the group. One Zen 3 core, D = 256, G = 4,
# 1024 queries on 8192 keys: 51-59 GFLOP/s for every tile from 256 x 256 to 1024 x 1024 (a bare product: 64);
# with a window of 512 keys 35 GFLOP/s here, 24 at 1024 x 512, 12 at 4096 x 512: tiles hang over the window.
TILE_ROWS = 512
TILE_KEYS = 512


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    key_len: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    soft_cap: float | None,
    window: int | None,
    bias: Tensor | None = None,
    bias_scale: float = 1.0,
) -> None:
    """Fold the causal attention of a query chunk over one key segment into `(out, lse)`.

    Allocates fp32 tiles of the queries, keys, values and logits, one (row, KV head) at a time.

    Args:
        q: [B, Hq, Q, D], any float dtype; query i is at query_start[b] + i. Negative positions see nothing.
        k: [B, Hkv, M, C', D]; key j is [j // C', j % C'] at position key_start[b] + j. Plain chunk: M = 1.
        v: [B, Hkv, M, C', D].
        query_start: int32 [B], positions.
        key_start: int32 [B], positions.
        key_len: int32 [B], keys of the segment that exist; those at negative positions do not. The rest may
            hold anything.
        out: fp32 [B, Hq, Q, D], the result so far (0 at first), updated in place.
        lse: fp32 [B, Hq, Q], natural log, the result so far (-inf at first), updated in place.
        softmax_scale: factor on q.k.
        soft_cap: None, or the logit becomes soft_cap * tanh(logit / soft_cap).
        window: None, or a query sees only the last `window` positions up to its own.
        bias: [B, Hkv, M, C'] or None: a number per key; `bias_scale` times it is added to the (capped) logit.
        bias_scale: factor on the bias.
    """
    batch, num_kv_heads, group_size = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    limits = zip(query_start.numpy(), key_start.numpy(), key_len.numpy(), strict=True)
    for b, (first, key_first, num_keys) in zip(range(batch), limits, strict=True):
        for h in range(num_kv_heads):
            group = slice(h * group_size, (h + 1) * group_size)
            fold_head(
                q[b, group], k[b, h], v[b, h], int(first), int(key_first), int(num_keys),
                out[b, group], lse[b, group], softmax_scale, soft_cap, window,
                None if bias is None else bias[b, h, :, :, None], bias_scale,
            )  # fmt: skip


def fold_head(
    q, k, v, query_start, key_start, key_len, out, lse, scale, soft_cap, window, bias, bias_scale
) -> None:
    """One row and KV head: q, out [G, Q, D]; k, v [M, C', D]; lse [G, Q]; bias [M, C', 1] or None."""
    group_size, num_queries, head_dim = q.shape
    rows = max(16, TILE_ROWS // group_size)
    for i in range(0, num_queries, rows):
        tile = slice(i, min(i + rows, num_queries))
        pos = query_start + torch.arange(tile.start, tile.stop)  # [n]
        first, last = query_start + tile.start, query_start + tile.stop - 1
        lo = max(0, -key_start, 0 if window is None else first - window + 1 - key_start)
        hi = min(key_len, last + 1 - key_start)
        if lo >= hi:
            continue
        scaled = (q[:, tile].float() * scale).reshape(-1, head_dim)  # [R, D], R = G * n
        # The result so far is one more key: weight 1, value `out`, logit `lse`.
        top = lse[:, tile].flatten()  # [R]
        total, acc = (top > -torch.inf).float(), out[:, tile].reshape(-1, head_dim).clone()
        for j in range(lo, hi, TILE_KEYS):
            end = min(j + TILE_KEYS, hi)
            x = scaled @ key_rows(k, j, end).T  # [R, keys]
            if soft_cap is not None:
                x.div_(soft_cap).tanh_().mul_(soft_cap)
            if bias is not None:
                x.add_(key_rows(bias, j, end)[:, 0], alpha=bias_scale)
            if key_start + end - 1 > first or (window is not None and key_start + j <= last - window):
                key_pos = key_start + torch.arange(j, end)
                hidden = key_pos > pos[:, None]
                if window is not None:
                    hidden |= key_pos <= pos[:, None] - window
                x.view(group_size, -1, end - j).masked_fill_(hidden, -torch.inf)
            new = torch.maximum(top, x.amax(1))
            shift = new.masked_fill(new == -torch.inf, 0)
            x.sub_(shift[:, None]).exp_()
            decay = (top - shift).exp_()
            total.mul_(decay).add_(x.sum(1))
            acc.mul_(decay[:, None]).addmm_(x, key_rows(v, j, end))
            top = new
        acc.div_(total.masked_fill(total == 0, 1)[:, None])
        out[:, tile] = acc.view(group_size, -1, head_dim)
        lse[:, tile] = (top + total.log()).view(group_size, -1)


def key_rows(x: Tensor, start: int, end: int) -> Tensor:
    """Keys [start, end) of blocked rows [M, C', D] as fp32 [end - start, D]."""
    if x.shape[0] == 1:
        return x[0, start:end].float()
    size = x.shape[1]
    offset = start // size * size
    return x[start // size : -(-end // size)].float().reshape(-1, x.shape[2])[start - offset : end - offset]
