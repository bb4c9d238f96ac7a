"""Models by shape: load or invent weights, share them between subjects, count bytes and flops of a step."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from rheo_offload.config import RheoConfig
from rheo_offload.model.fused import fuse_as_configured
from rheo_offload.model.specs import layer_specs, text_config
from rheo_offload.selection.policy import make_selector, mean_values
from rheo_offload.types import LayerSpec


def quick_config() -> PreTrainedConfig:
    """The shape of `--quick`: small enough for a CPU, with grouped heads and several layers."""
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
    )


def load_config(model: str) -> PreTrainedConfig:
    """Read a config from a config.json file, a model directory or a hub id.

    Raises:
        ValueError: a .json file that is missing, is not JSON or names no model type.
    """
    path = Path(model)
    if path.suffix != ".json":
        return AutoConfig.from_pretrained(model)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"--model {model}: not a config.json with a model_type ({error})") from error


def random_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with random weights directly on the device (normal, the config's `initializer_range`)."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return model.eval().requires_grad_(False)


def load_model(model: str | None, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint (directory or hub id), or invent weights for a config.json."""
    if model is None:
        return random_model(quick_config(), device, dtype)
    path = Path(model)
    has_weights = (
        any(path.glob("*.safetensors")) or any(path.glob("*.bin")) if path.is_dir() else not path.exists()
    )
    if not has_weights or path.suffix == ".json":
        return random_model(load_config(model), device, dtype)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval().requires_grad_(False)


def view(model: PreTrainedModel, attn_implementation: str | None = None) -> PreTrainedModel:
    """Return a second module tree over the same weights, whose attention can be switched on its own."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    if attn_implementation is not None:
        other.set_attn_implementation(attn_implementation)
    return other


def merge_weights(model: PreTrainedModel) -> None:
    """Let the weights take the addresses that fused subjects give them, on a GPU: before anything is captured."""
    fuse_as_configured(view(model), "auto")


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Shrink a config for the gate: same architecture, head dim, group size and kinds of layer."""
    tiny = copy.deepcopy(text_config(config))
    spec = layer_specs(config)[0]
    kinds = list(dict.fromkeys(getattr(tiny, "layer_types", None) or []))
    tiny.num_hidden_layers = max(2, len(kinds))
    if kinds:
        tiny.layer_types = (kinds * 2)[: tiny.num_hidden_layers]
    tiny.num_key_value_heads = min(2, spec.num_kv_heads)
    tiny.num_attention_heads = tiny.num_key_value_heads * spec.group_size
    # Some architectures have no head_dim of their own and divide.
    tiny.hidden_size = tiny.num_attention_heads * spec.head_dim
    tiny.intermediate_size, tiny.vocab_size = 128, 512
    tiny.bos_token_id = tiny.eos_token_id = 0
    tiny.pad_token_id = None
    # Large enough for attention to be far from uniform: a lost block must change tokens.
    tiny.initializer_range = 1.5 * tiny.hidden_size**-0.5
    return tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """What one decode step must read from device memory at least, and its flops."""

    weight_bytes: int
    kv_bytes: int
    summary_bytes: int
    flops: int

    @property
    def floor_bytes(self) -> int:
        """Bytes of the floor."""
        return self.weight_bytes + self.kv_bytes + self.summary_bytes


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights a step reads: all but an input embedding that is not the output one too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    tied = head is not None and head.weight is embedding
    return total if tied else total - embedding.numel() * embedding.element_size()


def step_cost(
    model: PreTrainedModel, config: RheoConfig | None, *, rows: int, context_len_tokens: int
) -> StepCost:
    """Count one decode step of a dense model.

    Args:
        model: its weights (each counted once: too high for mixtures of experts), dtype and layers.
        config: a resolved configuration (sparse attention and its summaries), or None for dense attention.
        rows: rows of the batch.
        context_len_tokens: length of every row.
    """
    itemsize = model.dtype.itemsize
    kv_bytes = summary_bytes = attention_flops = 0
    for spec in layer_specs(model.config):
        tokens = _attended_tokens(spec, config, context_len_tokens)
        kv_bytes += rows * tokens * 2 * spec.num_kv_heads * spec.head_dim * itemsize
        attention_flops += rows * tokens * 4 * spec.num_q_heads * spec.head_dim
        if config is not None and not spec.is_sliding and spec.layer_idx not in config.selection.dense_layers:
            size, selection = config.cache.block_size, config.selection
            selector = make_selector(selection.method, selection.params, block_size=size)
            vectors = selector.summary_width(size) + mean_values(
                selector, selection.remainder, block_size=size
            )
            vectors *= context_len_tokens // size
            summary_bytes += rows * vectors * spec.num_kv_heads * spec.head_dim * itemsize
    weights = weight_bytes(model)
    flops = 2 * rows * (weights // itemsize) + attention_flops
    return StepCost(weight_bytes=weights, kv_bytes=kv_bytes, summary_bytes=summary_bytes, flops=flops)


def _attended_tokens(spec: LayerSpec, config: RheoConfig | None, context_len_tokens: int) -> int:
    if spec.window is not None:
        return min(spec.window, context_len_tokens)
    if config is None or config.selection.method == "full" or spec.layer_idx in config.selection.dense_layers:
        return context_len_tokens
    size = config.cache.block_size
    return min(context_len_tokens, int(config.selection.token_budget) // size * size)
