"""Tiny random-weight models, one per supported family; weights so large that a wrong mask shows in the logits."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# family -> (model type, config overrides). Four layers where kinds alternate, two otherwise; every window is short.
BASE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=97,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
MIXED = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("llama", {}),
    "llama-mqa": ("llama", dict(num_key_value_heads=1)),
    "qwen2": ("qwen2", {}),
    "qwen2-mixed": (
        "qwen2",
        dict(layer_types=MIXED, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    ),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": (
        "qwen3_moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            decoder_sparse_step=1,
            norm_topk_prob=True,
        ),
    ),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mistral-sliding": ("mistral", dict(sliding_window=24)),
    "phi3": ("phi3", dict(sliding_window=None)),
    "gemma2": (
        "gemma2",
        dict(layer_types=MIXED, sliding_window=24, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    ),
    "gemma3": ("gemma3_text", dict(layer_types=MIXED, sliding_window=24, query_pre_attn_scalar=16)),
    "gpt_oss": (
        "gpt_oss",
        dict(layer_types=MIXED, sliding_window=24, num_local_experts=4, num_experts_per_tok=2),
    ),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", dict(attention_multiplier=0.2, embedding_multiplier=2.0, residual_multiplier=0.5)),
    "smollm3": ("smollm3", {}),
    "glm4": ("glm4", dict(partial_rotary_factor=0.5)),
}


def tiny_config(family: str, **overrides):
    """Return the family's tiny config."""
    kind, specific = FAMILIES[family]
    return AutoConfig.for_model(kind, **(BASE | specific | overrides))


def tiny_model(family: str, seed: int = 0, dtype=torch.float32, device="cpu", **overrides):
    """Build the family's tiny model with eager attention, in eval mode, with scaled-up random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), attn_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("sinks"):
                p.copy_(torch.randn_like(p))
            elif p.ndim > 1:
                p.normal_(0.0, 0.25)
            elif "norm" not in name:
                p.normal_(0.0, 0.05)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(device=device, dtype=dtype).eval()
