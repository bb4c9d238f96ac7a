"""The self-test at attach: our attention against the modeling file's own, on the model's real queries and keys.

Logits would not tell: in bf16 two exact implementations already differ by percents. So each layer's own q, k, v
are upcast to fp32, the queries are multiplied (which makes a soft cap visible), and a few query rows are compared
layer by layer. What it finds: a missing soft cap or sink, a wrong window, a pattern we do not implement, padding
that is not honoured.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rheo_offload.errors import UnsupportedModelError
from rheo_offload.execution.prefill import dense_attention
from rheo_offload.model.attention_hook import NAME, classify
from rheo_offload.ops import kernels_for
from rheo_offload.types import AttentionCall, LayerSpec

PROBE = "rheo_self_test"
QUERY_GAIN = 64.0
LIMIT = 1e-3
PADDING = 3
QUERIES = 24  # compared per row: the first and the last ones
SHORTEST, LONGEST = (
    40,
    1100,
)  # a window beyond LONGEST is not exercised: the forward would cost more than it tells


def self_test(model: PreTrainedModel, specs: Sequence[LayerSpec]) -> None:
    """Run one padded batch of two rows and compare every layer.

    Raises:
        UnsupportedModelError: a layer's result differs by more than `LIMIT`; the message names the layers.
    """
    windows = [s.window for s in specs if s.window and s.window + 24 <= LONGEST]
    tokens = max([SHORTEST, *(w + 24 for w in windows)])
    errors: dict[int, float] = {}
    AttentionInterface.register(PROBE, _probe(model, specs, errors))
    AttentionMaskInterface.register(PROBE, _dense_mask)
    try:
        model.set_attn_implementation(PROBE)
        _run(model, tokens)
    finally:
        model.set_attn_implementation(NAME)
        AttentionInterface._global_mapping.pop(PROBE, None)
        AttentionMaskInterface._global_mapping.pop(PROBE, None)
    wrong = [f"{i} ({error:.1e})" for i, error in sorted(errors.items()) if not error <= LIMIT]
    if len(errors) != len(specs):
        raise UnsupportedModelError([f"{len(specs)} attention layers expected, {len(errors)} were called"])
    if wrong:
        raise UnsupportedModelError(
            [
                f"our attention differs from the model's own in layers {', '.join(wrong)}: relative error above {LIMIT}"
            ]
        )


def _run(model: PreTrainedModel, tokens: int) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (2, tokens), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)


def _dense_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    mask_function: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Build the mask the model asks for as [B, 1, Q, K] bool, straight from its own mask function."""
    if use_vmap or mask_function is None:
        return None
    device = attention_mask.device if attention_mask is not None else device
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    q = torch.arange(q_length, device=device)[None, None, :, None]
    k = torch.arange(kv_length, device=device)[None, None, None, :]
    head = torch.zeros((), dtype=torch.long, device=device)
    try:
        allowed = mask_function(rows, head, q, k).expand(batch_size, 1, q_length, kv_length)
    except Exception:  # the pattern cannot be evaluated: attention refuses it by the missing mask
        return None
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, None, :]
    if classify(mask_function, local_size, use_vmap) == "other":
        allowed = allowed.clone()
        allowed._rheo_other = True  # type: ignore[attr-defined]
    return allowed


def _probe(model: PreTrainedModel, specs: Sequence[LayerSpec], errors: dict[int, float]) -> Any:
    """Return an attention function that compares ours with the modeling file's eager one and goes on with ours."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **other: Any,
    ) -> tuple[torch.Tensor, None]:
        i, ops = int(module.layer_idx), kernels_for(query.device)  # type: ignore[arg-type]
        if attention_mask is None or getattr(attention_mask, "_rheo_other", False):
            raise UnsupportedModelError(
                [f"layer {i} uses a mask that is neither causal nor a sliding window"]
            )
        _check_shapes(specs[i], query, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        rows = _sampled_rows(query.shape[2], query.device)
        bias = torch.zeros(attention_mask.shape, device=query.device).masked_fill(~attention_mask, -1e30)
        extra = {"softcap": softcap} if softcap is not None else {}
        truth = eager(
            module, query.float()[:, :, rows] * QUERY_GAIN, key.float(), value.float(), bias[:, :, rows],
            scaling=scale, dropout=dropout, **extra, **other,
        )[0]  # fmt: skip
        call = AttentionCall(
            query.float() * QUERY_GAIN,
            key.float(),
            value.float(),
            scale,
            softcap,
            None if s_aux is None else s_aux.float(),
        )
        padding = _padding(attention_mask)
        ours = dense_attention(ops, call, padding, specs[i].window)
        ours = ours.transpose(1, 2)[:, rows]
        real = (rows[None] >= padding[:, None])[..., None, None]
        difference = torch.where(real, ours - truth, 0.0).norm()
        errors[i] = max(errors.get(i, 0.0), float(difference / torch.where(real, truth, 0.0).norm()))
        plain = AttentionCall(query, key, value, scale, softcap, s_aux)
        return dense_attention(ops, plain, padding, specs[i].window).transpose(1, 2).contiguous(), None

    return attention


def _check_shapes(spec: LayerSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse a layer whose heads are not what its config promised: the cache is laid out from the config."""
    promised = (spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim)
    found = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
    if found != promised:
        what = f"layer {spec.layer_idx} has (query heads, KV heads, key dim, value dim)"
        raise UnsupportedModelError([f"{what} {found}, its config says {promised}"])


def _padding(mask: torch.Tensor) -> torch.Tensor:
    """Return each row's left padding from a [B, 1, Q, K] mask: queries that may not even see themselves."""
    diagonal = torch.diagonal(mask[:, 0], dim1=1, dim2=2)
    return (~diagonal).long().cumprod(1).sum(1)


def _sampled_rows(queries: int, device: torch.device) -> torch.Tensor:
    first = torch.arange(min(QUERIES // 2, queries), device=device)
    last = torch.arange(max(queries - QUERIES // 2, len(first)), queries, device=device)
    return torch.cat([first, last])
