"""Which rotation each attention layer of a model applies, read from its rotary module and checked against its code."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rheo_offload.errors import UnsupportedModelError
from rheo_offload.selection.rope import Rope
from rheo_offload.types import LayerSpec

# Positions the rotation is compared at: the first ones, and one whose slow channels have turned too.
PROBED = (0, 1, 2, 63, 1000)
TOLERANCE = 1e-4  # fp32 angles at position 1000 differ by 6e-5 at most


def layer_ropes(model: PreTrainedModel, specs: Sequence[LayerSpec]) -> dict[int, Rope]:
    """Return the rotation of every full-attention layer, with its frequencies on the model's device.

    Each is compared with what the modeling file does to random queries and keys at a few positions.

    Raises:
        UnsupportedModelError: a layer's rotation is not one that can be undone here; every reason at once.
    """
    decoder: Any = model.get_decoder()
    found: dict[int, Rope] = {}
    problems: list[str] = []
    for spec in specs:
        if spec.is_sliding:
            continue
        try:
            found[spec.layer_idx] = _rope_of(decoder, spec)
        except (AttributeError, TypeError, RuntimeError) as error:
            problems.append(f"layer {spec.layer_idx}: its rotary embedding is not as expected: {error}")
        except UnsupportedModelError as error:
            problems += error.reasons
    if problems:
        raise UnsupportedModelError(problems)
    return found


def _rope_of(decoder: Any, spec: LayerSpec) -> Rope:
    attention, rotary = decoder.layers[spec.layer_idx].self_attn, decoder.rotary_emb
    device = next(attention.parameters()).device
    if not getattr(attention, "use_rope", True):  # SmolLM3 leaves some layers unrotated
        return Rope(torch.empty(0, device=device))
    kind = "full_attention" if hasattr(rotary, "full_attention_inv_freq") else ""
    prefix = f"{kind}_" if kind else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq").float().to(device)
    scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
    positions = torch.tensor([PROBED], device=device)
    sample = torch.randn(1, 2, len(PROBED), spec.head_dim, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    cos, sin = rotary(sample, positions, *([kind] if kind else []))
    theirs: Tensor = _their_function(attention)(sample, sample, cos, sin)[0]
    for interleaved in (False, True):
        rope = Rope(inv_freq, scaling, interleaved)
        if (
            theirs.shape == sample.shape
            and torch.allclose(rope.apply(sample, positions[0]), theirs, atol=TOLERANCE)
            and torch.allclose(rope.undo(theirs, positions[0]), sample, atol=TOLERANCE)
        ):
            return rope
    raise UnsupportedModelError(
        [f"layer {spec.layer_idx}: {type(attention).__name__} rotates in a way that is not undone here"]
    )


def _their_function(attention: nn.Module) -> Any:
    """Return the rotation that the layer's modeling file defines."""
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb
