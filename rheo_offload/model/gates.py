"""SeerAttention-R gates of a model: read from a side file or a published checkpoint, checked, bound to its layers.

The names are those of the published checkpoints (microsoft/SeerAttention), by layer:

    self_attn.attn_gate.attngate_linear_q.weight [Hkv, G, D, D]
    self_attn.attn_gate.attngate_linear_k.weight [Hkv, 3 * D, D]     maxima, minima, means
    self_attn.attn_gate.attngate_qnorm.weight, attngate_knorm.weight [D]     both or neither

Pooling other than `Kmaxminavg` and `Qproj`, or a gate narrower than the head dim, has other shapes and is refused.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from rheo_offload.errors import HeadsError, UnsupportedModelError
from rheo_offload.model.learned_heads import HeadsFile, info_problems, read_heads, shape_problems
from rheo_offload.model.rope import layer_ropes
from rheo_offload.model.specs import text_config
from rheo_offload.selection.rope import Rope
from rheo_offload.selection.seer_r import SeerGate
from rheo_offload.types import LayerSpec

__all__ = ["GATE_TENSORS", "gate_tensors", "load_gates"]

_PREFIX = "self_attn.attn_gate.attngate_"
QUERY, KEY = f"{_PREFIX}linear_q.weight", f"{_PREFIX}linear_k.weight"
QUERY_NORM, KEY_NORM = f"{_PREFIX}qnorm.weight", f"{_PREFIX}knorm.weight"
GATE_TENSORS = (QUERY, KEY, QUERY_NORM, KEY_NORM)


def load_gates(
    path: str | None,
    model: PreTrainedModel,
    specs: Sequence[LayerSpec],
    *,
    block_size: int,
    dense_layers: Sequence[int] = (),
) -> dict[int, SeerGate]:
    """Return the gate of every full-attention layer that is not kept dense, on the model's device, in its dtype.

    Args:
        path: `selection.params.weights`.
        model: the model that is being offloaded.
        specs: its attention layers.
        block_size: tokens in a block of the cache.
        dense_layers: layers that need none.

    Raises:
        HeadsError: with everything that is missing, misshapen, not finite, meant for another model or
            block size, or a rotation that cannot be undone.
    """
    gated = [s for s in specs if not s.is_sliding and s.layer_idx not in dense_layers]
    if path is None:
        raise HeadsError(
            [
                "method 'seer_r' needs selection.params.weights, a safetensors file with gates "
                "(rheo calibrate --kind gate makes one)"
            ]
        )
    file = read_heads(path, GATE_TENSORS)
    problems = info_problems(file.info, specs, text_config(model.config).model_type)
    fitted = file.info.gate_block_size if file.info else 0
    if fitted not in (0, block_size):
        problems.append(
            f"its gates were fitted to blocks of {fitted} tokens; set cache.block_size={fitted}, not {block_size}"
        )
    problems += _gate_problems(file, gated)
    ropes: Mapping[int, Rope] = {}
    try:
        ropes = layer_ropes(model, gated)
    except UnsupportedModelError as error:
        problems += error.reasons
    if problems:
        raise HeadsError(problems)
    one = next(model.parameters())
    gates = {}
    for i in ropes:
        named = {name: t.to(one.device, one.dtype) for name, t in file.layers[i].items()}
        gates[i] = SeerGate(
            named[QUERY],
            named[KEY],
            ropes[i],
            query_norm=named.get(QUERY_NORM),
            key_norm=named.get(KEY_NORM),
        )
    return gates


def gate_tensors(gate: SeerGate) -> dict[str, Tensor]:
    """Return a gate's tensors by the names they have in a file."""
    named = {QUERY: gate.w_query, KEY: gate.w_key, QUERY_NORM: gate.query_norm, KEY_NORM: gate.key_norm}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _gate_problems(file: HeadsFile, gated: Sequence[LayerSpec]) -> list[str]:
    wanted = {
        s.layer_idx: {
            QUERY: (s.num_kv_heads, s.group_size, s.head_dim, s.head_dim),
            KEY: (s.num_kv_heads, 3 * s.head_dim, s.head_dim),
        }
        for s in gated
    }
    optional = {s.layer_idx: {QUERY_NORM: (s.head_dim,), KEY_NORM: (s.head_dim,)} for s in gated}
    problems = shape_problems(file.layers, wanted, optional)
    for i in wanted:
        held = file.layers.get(i, {})
        if (QUERY_NORM in held) != (KEY_NORM in held):
            problems.append(f"layers.{i} has only one of {QUERY_NORM} and {KEY_NORM}")
    return problems
