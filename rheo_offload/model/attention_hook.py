"""The attention and mask functions that transformers calls on our behalf.

Both are registered under one name, once, when a model is offloaded; a model uses them only while its attention
implementation has that name. The contract is in ARCHITECTURE.md ("What transformers guarantees").
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from rheo_offload.errors import CacheError, UnsupportedModelError
from rheo_offload.execution.prefill import dense_attention
from rheo_offload.model.hf_cache import TAG
from rheo_offload.model.learned_heads import fill_bias
from rheo_offload.model.padding import left_padding
from rheo_offload.ops import kernels_for
from rheo_offload.types import AttentionCall

NAME = "rheo"
# Keyword arguments that carry no arithmetic, or that the model derives what we get elsewhere from.
HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_router_logits",
    "is_causal",
    "cu_seq_lens_q",
}


def register() -> None:
    """Make the name known to transformers (idempotent; changes no model)."""
    AttentionInterface.register(NAME, rheo_attention)
    AttentionMaskInterface.register(NAME, rheo_mask)


def rheo_mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: Any = None,
    *,
    attention_mask: torch.Tensor | None = None,
    mask_function: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Pass the 2-D padding mask through; any other pattern becomes a 4-D marker that attention refuses.

    Nothing is raised here because some models build masks that no layer uses. Never reads device data.
    """
    if mask_function is not None and classify(mask_function, local_size, use_vmap) == "other":
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    return attention_mask


def classify(mask_function: Any, local_size: int | None = None, use_vmap: bool = False) -> str:
    """Return `causal`, `sliding` or `other` by asking a mask function about a few positions on the CPU."""
    if use_vmap:
        return "other"
    w = local_size or 7
    pairs = [(0, 0), (5, 4), (5, 5), (5, 6), (w, 0), (w, 1), (2 * w + 3, w + 3), (2 * w + 3, w + 4)]
    pairs += [(2 * w + 3, 2 * w + 3), (2 * w + 3, 0), (4 * w + 1, 3 * w)]
    q, k = torch.tensor(pairs).T
    zero = torch.zeros_like(q)
    try:
        got = mask_function(zero, zero, q, k)
    except Exception:  # a pattern that needs real device tensors is by definition not one of the two
        return "other"
    if got.device.type != "cpu" or got.shape != q.shape:
        return "other"
    if torch.equal(got, k <= q):
        return "causal"
    if local_size and torch.equal(got, (k <= q) & (k > q - local_size)):
        return "sliding"
    return "other"


def rheo_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Attend one layer of one forward.

    Args:
        module: the attention module (only for messages).
        query: [B, Hq, Q, D] after RoPE.
        key, value: [B, Hkv, Q, D]: what the cache's `update` returned, tagged; untagged when there is no cache.
        attention_mask: [B, tokens so far] bool, left padding only, or None.
        scaling: softmax scale; D ** -0.5 when None.
        dropout: must be 0.
        sliding_window: window of the layer; only used without a cache (the cache knows its layers).
        softcap: logit soft cap.
        s_aux: [Hq] attention sinks.
        other: refused when it is a tensor or number that could change the result.

    Returns:
        [B, Q, Hq, D] and None (weights are never materialised).
    """
    _refuse(module, query, attention_mask, dropout, other)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(query, key, value, scale, softcap, s_aux)
    fill_bias(module, call)
    source = getattr(key, TAG, None)
    if source is not None:
        cache, layer_idx = source
        out = cache.attend(layer_idx, call, attention_mask)
    elif key.shape[2] == query.shape[2]:
        mask = query.new_ones(query.shape[0], 1) if attention_mask is None else attention_mask
        out = dense_attention(kernels_for(query.device), call, left_padding(mask), sliding_window)
    else:
        raise CacheError(
            f"{type(module).__name__}: the cache passed to this model is not one of ours; leave past_key_values out of "
            "generate, or pass model.rheo.new_cache()"
        )
    return out.transpose(1, 2).contiguous(), None


def _refuse(
    module: torch.nn.Module,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    other: dict[str, Any],
) -> None:
    """Refuse what would change the result: reasons first found, nothing stored yet."""
    name = type(module).__name__
    if mask is not None and mask.ndim != 2:
        raise UnsupportedModelError(
            [f"{name} uses a mask that is neither causal nor a sliding window with left padding"]
        )
    if dropout:
        raise UnsupportedModelError([f"{name} asks for attention dropout; call model.eval()"])
    if other.get("is_causal") is False:
        raise UnsupportedModelError([f"{name} asks for bidirectional attention"])
    if query.requires_grad:
        raise CacheError("offloaded attention has no backward pass; run under torch.no_grad()")
    unknown = sorted(
        key
        for key, value in other.items()
        if key not in HARMLESS
        and (torch.is_tensor(value) or (isinstance(value, int | float) and not isinstance(value, bool)))
    )
    if unknown:
        raise UnsupportedModelError([f"{name} passes {unknown} to attention, which is not implemented here"])
