"""Models that cannot be offloaded are refused with every reason, and left exactly as they were."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rheo_offload import ConfigError, RheoConfig, UnsupportedModelError, offload
from rheo_offload.model import offload as offload_module
from tests.helpers.tiny_model import tiny_model

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, pad_token_id=0)
REFUSED = {
    "deepseek_v3": (
        dict(
            SMALL, intermediate_size=32, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=2,
        ),
        "MLA",
    ),
    "llama4_text": (
        dict(
            SMALL, intermediate_size=32, intermediate_size_mlp=32, num_key_value_heads=2, head_dim=16,
            num_local_experts=2, attention_chunk_size=8,
        ),
        "chunked_attention",
    ),
    "bloom": (dict(hidden_size=32, n_layer=2, n_head=2, vocab_size=50), "attention interface"),
    "mamba": (dict(hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=4), "layer"),
}  # fmt: skip


def state_of(model):
    return model.config._attn_implementation, sorted(model.__dict__)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(kind):
    overrides, reason = REFUSED[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **overrides)).eval()
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        offload(model)
    assert state_of(model) == before


def test_encoder_decoder_is_refused():
    config = AutoConfig.for_model(
        "t5", d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=50
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        offload(AutoModelForSeq2SeqLM.from_config(config).eval())


def test_all_reasons_at_once():
    model = tiny_model("llama").train()
    model.config.kv_lora_rank = 8
    with pytest.raises(UnsupportedModelError) as refused:
        offload(model)
    assert len(refused.value.reasons) == 2


def test_rope_that_changes_with_length():
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        offload(model)


def test_twice_is_refused():
    model = offload(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match="already"):
        offload(model)


def test_meta_device_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()
    with pytest.raises(UnsupportedModelError, match="meta"):
        offload(model)


def test_dense_layers_beyond_the_model():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"\[7\]"):
        offload(model, RheoConfig.from_dict({"selection": {"dense_layers": [0, 7]}}))
    assert "rheo" not in model.__dict__


def test_heads_that_differ_from_the_config_are_refused():
    """The cache is laid out from the config, so a config that says something else must not get through."""
    model = tiny_model("llama")
    model.config.num_key_value_heads = 4
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 has .*\(4, 2, 16, 16\), its config says \(4, 4, 16, 16\)"
    ):
        offload(model)


def test_method_parameters_nobody_reads_are_refused():
    with pytest.raises(ConfigError, match="takes none, not window"):
        offload(tiny_model("llama"), RheoConfig.from_dict({"selection": {"params": {"window": 3}}}))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gemma3"])
def test_self_test_finds_what_is_left_out(family, monkeypatch):
    """Mutants: without soft cap, without sinks, without window. Each must be found at attach."""
    from rheo_offload.model import self_test

    right = self_test.dense_attention

    def wrong(ops, call, padding, window):
        if family == "gemma2":
            call.soft_cap = None
        elif family == "gpt_oss":
            call.sinks = None
        else:
            window = None
        return right(ops, call, padding, window)

    monkeypatch.setattr(self_test, "dense_attention", wrong)
    model = tiny_model(family)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match="differs from the model's own"):
        offload(model)
    assert state_of(model) == before
    assert offload_module.attention_hook.NAME not in before
