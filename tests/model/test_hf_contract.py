"""What this project assumes of transformers, each assumption in one named place."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from tests.helpers.tiny_model import tiny_model
from tests.model import test_families


def batch(lengths):
    """Ragged prompts on the CPU, where these models are."""
    return tuple(t.cpu() for t in test_families.batch(lengths))


def capture(model, ids, **kwargs):
    """Run a forward with a recording attention function; return its calls."""
    calls = []

    def attention(module, query, key, value, attention_mask, **kw):
        calls.append((module, query, key, value, attention_mask, kw))
        groups = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True
        )
        return out.transpose(1, 2).contiguous(), None

    masks = []

    def mask(*args, attention_mask=None, **kw):
        masks.append(kw)
        return attention_mask

    AttentionInterface.register("contract", attention)
    AttentionMaskInterface.register("contract", mask)
    model.set_attn_implementation("contract")
    with torch.no_grad():
        model(ids, **kwargs)
    return calls, masks


def test_attention_gets_what_update_returned():
    model = tiny_model("llama")
    ids, mask = batch((20, 11))

    class Tagging(DynamicCache):
        def update(self, k, v, layer_idx, *args, **kwargs):
            k = k.view_as(k)
            k.tag = layer_idx
            return k, v

    calls, masks = capture(model, ids, attention_mask=mask, past_key_values=Tagging())
    assert [c[2].tag for c in calls] == [0, 1], "the key object reaches the attention function"
    module, query, key, value, passed, kw = calls[0]
    assert query.shape == (2, 4, 20, 16) and key.shape == (2, 2, 20, 16) == value.shape
    assert torch.equal(passed, mask.bool()), "the padding mask comes through the mask function"
    assert module.layer_idx == 0 and kw["scaling"] == 16**-0.5
    assert len(masks) == 1 and "mask_function" in masks[0], "one mask per kind and forward"


def test_soft_cap_sinks_and_window_are_keywords():
    ids, _ = batch((30,))
    calls, _ = capture(tiny_model("gemma2"), ids)
    assert [c[5]["softcap"] for c in calls] == [5.0, 5.0]
    assert [c[5]["sliding_window"] for c in calls] == [24, None]
    calls, _ = capture(tiny_model("gpt_oss"), ids)
    assert calls[0][5]["s_aux"].shape == (4,)


def test_layer_mixin_asks_for_what_we_implement():
    abstract = CacheLayerMixin.__abstractmethods__
    assert abstract == {"update", "lazy_initialization", "get_seq_length", "get_mask_sizes", "get_max_length"}
    assert hasattr(Cache, "reorder_cache") and hasattr(Cache, "crop")
