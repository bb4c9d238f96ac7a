"""What a layer's attention did on a window of text, reduced to what fitting needs while the forward runs.

Only some queries are kept, and of the keys and weights only what there is per block; so a window of S tokens costs a
layer about S * Hkv * D (the values) + T * (Hq * D + 2 * Hkv * N) numbers, on the CPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rheo_offload.model.attention_hook import rheo_attention, rheo_mask
from rheo_offload.model.learned_heads import fill_bias
from rheo_offload.model.rope import layer_ropes
from rheo_offload.model.specs import layer_specs
from rheo_offload.selection.rope import Rope
from rheo_offload.selection.seer_r import pool_keys
from rheo_offload.types import AttentionCall

PROBE = "rheo_calibrate"
QUERIES_AT_ONCE = 64  # whose weights over all keys are held at a time


@dataclass(slots=True)
class Sample:
    """One layer's attention on one window: S tokens in N whole blocks of C, T of the queries. On the CPU, fp32."""

    positions: Tensor  # int64 [T], ascending
    q: Tensor  # [Hkv, G, T, D] after RoPE
    q_raw: Tensor  # the same before RoPE
    mean_keys: Tensor  # [N, Hkv, D] after RoPE
    pooled: Tensor  # [N, Hkv, 3 * D], `pool_keys` before RoPE
    values: Tensor  # [N * C, Hkv * D], in the model's dtype
    mass: Tensor  # [T, Hkv, N]: attention weight on a block, mean over the group
    peak: Tensor  # [T, Hkv, N]: largest weight on a token of it, maximum over the group
    block_size: int
    softmax_scale: float
    bias: Tensor | None = (
        None  # [N, Hkv]: mean learned bias of a block's tokens, where the layer has a head for it
    )

    def closed(self) -> Tensor:
        """Return which blocks are closed for each query: bool [T, N]."""
        blocks = torch.arange(self.mass.shape[2])
        return blocks < ((self.positions + 1) // self.block_size)[:, None]


def capture(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    *,
    block_size: int,
    layers: Sequence[int],
    progress: Callable[[], None] | None = None,
) -> dict[int, Sample]:
    """Run one window through a model and return what its layers' attention did.

    The model's attention is replaced for the time of the call (exact, causal), its weights stay as they are. Heads of a
    learned bias that are attached to it (`model/learned_heads.py`) count, in the forward and in what is captured.

    Args:
        model: in eval mode, not offloaded.
        tokens: int64 [S].
        positions: int64 [T], the queries to keep, ascending.
        block_size: C.
        layers: the full-attention layers to look at.
        progress: called after each of them.

    Raises:
        UnsupportedModelError: a layer's rotary embedding cannot be undone.
    """
    specs = [s for s in layer_specs(model.config) if s.layer_idx in layers]
    ropes = layer_ropes(model, specs)
    found: dict[int, Sample] = {}

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        i = getattr(module, "layer_idx", None)
        if i in ropes:
            found[i] = _sample(_call(module, query, key, value, kwargs), ropes[i], positions, block_size)
            if progress is not None:
                progress()
        return rheo_attention(module, query, key, value, mask, **kwargs)

    with _replaced(model, attention), torch.inference_mode():
        device = next(model.parameters()).device
        model.get_decoder()(input_ids=tokens[None].to(device), use_cache=False)
    return {i: found[i] for i in ropes}


@contextmanager
def _replaced(model: PreTrainedModel, attention: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    AttentionInterface.register(PROBE, attention)
    AttentionMaskInterface.register(PROBE, rheo_mask)
    try:
        model.set_attn_implementation(PROBE)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(PROBE, None)
        AttentionMaskInterface._global_mapping.pop(PROBE, None)


def _call(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, kwargs: Mapping[str, Any]
) -> AttentionCall:
    """Return a layer's call as the runtime would see it, the bias of its head included."""
    scaling = kwargs.get("scaling")
    scale = k.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = AttentionCall(q, k, v, scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    fill_bias(module, call)
    return call


def _sample(call: AttentionCall, rope: Rope, positions: Tensor, block_size: int) -> Sample:
    """Reduce one layer: the call of one row, a whole window."""
    q, k, v = call.q[0], call.k[0], call.v[0]
    heads, tokens, _ = k.shape
    chosen = positions.to(k.device)
    q = q[:, chosen].unflatten(0, (heads, -1)).float()  # [Hkv, G, T, D]
    raw = rope.undo(k.float(), torch.arange(tokens, device=k.device))
    whole = tokens // block_size * block_size
    blocks, raw_blocks = (x[:, :whole].float().unflatten(1, (-1, block_size)) for x in (k, raw))
    bias = None if call.bias is None else call.bias[0, :, :whole].float().unflatten(1, (-1, block_size))
    mass, peak = zip(
        *(
            _block_weights(part, call, at, block_size)
            for part, at in zip(q.split(QUERIES_AT_ONCE, 2), chosen.split(QUERIES_AT_ONCE), strict=True)
        ),
        strict=True,
    )
    # clones: inference tensors cannot be trained on, and a view would keep the whole layer alive
    with torch.inference_mode(False):
        return Sample(
            positions=positions.clone(),
            q=_own(q),
            q_raw=_own(rope.undo(q, chosen)),
            mean_keys=_own(blocks.mean(2).transpose(0, 1)),
            pooled=_own(pool_keys(raw_blocks).transpose(0, 1)),
            values=_own(v[:, :whole].transpose(0, 1).flatten(1)),
            mass=_own(torch.cat(mass)),
            peak=_own(torch.cat(peak)),
            block_size=block_size,
            softmax_scale=call.softmax_scale,
            bias=None if bias is None else _own(bias.mean(2).T),
        )


def _own(x: Tensor) -> Tensor:
    return x.cpu().clone().contiguous()


def _block_weights(
    q: Tensor, call: AttentionCall, positions: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Return mass and peak [T, Hkv, N] over whole blocks, of queries q [Hkv, G, T, D] of one call."""
    k, cap = call.k[0], call.soft_cap
    logits = torch.einsum("hgtd,hsd->hgts", q, k.float()) * call.softmax_scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    if call.bias is not None and call.bias_scale is not None:
        logits += call.bias[0, :, None, None].float() * call.bias_scale
    future = torch.arange(k.shape[1], device=k.device) > positions[:, None]
    logits.masked_fill_(future, -torch.inf)
    total = logits.logsumexp(-1, keepdim=True)
    if call.sinks is not None:
        total = torch.logaddexp(total, call.sinks.float().view(*q.shape[:2], 1, 1))
    whole = k.shape[1] // block_size * block_size
    weights = (logits - total).exp()[..., :whole].unflatten(-1, (-1, block_size))  # [Hkv, G, T, N, C]
    mass, peak = weights.sum(-1).mean(1), weights.amax(-1).amax(1)
    return mass.transpose(0, 1), peak.transpose(0, 1)
