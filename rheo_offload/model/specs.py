"""What a Hugging Face config says of its attention layers, and whether this runtime can serve them."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from rheo_offload.errors import ConfigError, UnsupportedModelError
from rheo_offload.types import LayerSpec

TESTED = ("5.16", "5.18")  # first tested release, first untested one
KINDS = {"full_attention", "sliding_attention"}
MAX_HEAD_DIM = 256
# Keys of a config that say how a model was loaded, not which model it is.
_HOW_LOADED = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "name_or_path",
)


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the decoder's part of a config."""
    return config.get_text_config(decoder=True)


def config_problems(config: PreTrainedConfig) -> list[str]:
    """Return every reason, as one line each, why a model of this config cannot be served (empty: it can)."""
    problems = []
    text = text_config(config)
    if not Version(TESTED[0]) <= Version(transformers.__version__) < Version(TESTED[1]):
        problems.append(
            f"transformers {transformers.__version__} is outside the tested range >={TESTED[0]},<{TESTED[1]}"
        )
    if getattr(config, "is_encoder_decoder", False):
        problems.append("encoder-decoder models are not supported")
    if getattr(text, "kv_lora_rank", None):
        problems.append("multi-head latent attention (MLA) needs the latent path, which is not built yet")
    if getattr(text, "num_kv_shared_layers", None):
        problems.append("layers that share another layer's keys and values are not supported yet")
    problems += _rope_problems(text)
    types = _layer_types(text)
    unknown = sorted(set(types) - KINDS)
    if unknown:
        problems.append(f"layer types {unknown} have no implementation here")
    if not types:
        problems.append("the config names no attention layers")
    if not problems:
        problems += [p for spec in layer_specs(config) for p in _shape_problems(spec)][:1]
    return problems


def layer_specs(config: PreTrainedConfig) -> list[LayerSpec]:
    """Return one spec per attention layer.

    Raises:
        UnsupportedModelError: the config lacks the numbers that say so.
    """
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        raise UnsupportedModelError(["the config has no num_attention_heads"])
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    window = getattr(text, "sliding_window", None)
    return [
        LayerSpec(
            layer_idx=i,
            num_q_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            window=window if kind == "sliding_attention" else None,
        )
        for i, kind in enumerate(_layer_types(text))
    ]


def check_dense_layers(dense_layers: Collection[int], num_layers: int) -> None:
    """Raise `ConfigError` for `selection.dense_layers` that a model of so many layers does not have."""
    if beyond := [i for i in dense_layers if i >= num_layers]:
        raise ConfigError(f"selection.dense_layers names layers {beyond}; the model has {num_layers}")


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence the model was made for, in tokens, if the config says so."""
    return getattr(text_config(config), "max_position_embeddings", None)


def _layer_types(text: PreTrainedConfig) -> list[str]:
    if not hasattr(text, "num_hidden_layers"):
        return []
    return list(get_layer_types_and_kwargs(text)[0])


def _rope_problems(text: PreTrainedConfig) -> list[str]:
    """Rotary embeddings whose frequencies change with length would invalidate the keys already stored."""
    parameters: Any = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    kinds = {p.get("rope_type", p.get("type")) for p in [parameters, *nested]}
    changing = sorted(kinds & {"dynamic", "longrope"})
    return [
        f"rope type {kind!r} changes frequencies with length, which invalidates stored keys"
        for kind in changing
    ]


def _shape_problems(spec: LayerSpec) -> list[str]:
    if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
        return [f"head_dim {spec.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"]
    if spec.num_q_heads % spec.num_kv_heads:
        return [f"{spec.num_q_heads} query heads do not divide into {spec.num_kv_heads} KV heads"]
    return []


def config_hash(config: PreTrainedConfig) -> str:
    """Return 16 hex digits that name a model's configuration, whichever way it was loaded."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                str(k): kept(v)
                for k, v in value.items()
                if k not in _HOW_LOADED and not str(k).startswith("_")
            }
        return value

    text = json.dumps(kept(config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
