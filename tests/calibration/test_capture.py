"""What is captured of a window, against the model's own eager attention weights and its own unrotated queries."""

import sys

import pytest
import torch

from csrc_free_kernels.reference.token_bias import token_bias
from rheo_offload.calibration.capture import capture
from rheo_offload.model.attention_hook import rheo_attention
from rheo_offload.model.learned_heads import BiasHead, attach_heads
from rheo_offload.model.specs import layer_specs
from rheo_offload.selection.nosa import NOSA
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model

TOKENS, SIZE = 150, 32
POSITIONS = torch.tensor([0, 31, 32, 77, 149])


def window(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (TOKENS,), generator=generator)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "glm4", "granite"])
def test_masses_are_those_of_the_model(family):
    """Grouped heads, a soft cap, sinks, partial rotation, another scale; layers with a window are left out."""
    model = tiny_model(family, device=DEVICE)
    ids = window()
    with torch.no_grad():
        stock = model(ids[None].to(DEVICE), output_attentions=True).attentions
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(stock)
    layers = [i for i, kind in enumerate(types) if kind == "full_attention"]
    seen = []
    found = capture(model, ids, POSITIONS, block_size=SIZE, layers=layers, progress=lambda: seen.append(1))
    assert list(found) == layers and len(seen) == len(layers)
    assert model.config._attn_implementation == "eager"
    for i in layers:
        weights = stock[i][0, :, POSITIONS].cpu()[..., : TOKENS // SIZE * SIZE]  # [Hq, T, whole blocks]
        grouped = weights.unflatten(0, (2, -1)).unflatten(-1, (-1, SIZE))
        sample = found[i]
        torch.testing.assert_close(sample.mass, grouped.sum(-1).mean(1).transpose(0, 1), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(sample.peak, grouped.amax((-1, 1)).transpose(0, 1), atol=2e-5, rtol=1e-4)
        assert sample.closed().sum(1).tolist() == [0, 1, 1, 2, 4]


@pytest.mark.parametrize("family", ["llama", "qwen3", "glm4"])
def test_queries_and_keys_from_before_the_rotation(family, monkeypatch):
    """Against the arguments of the model's own rotary function, behind its norm of queries and keys."""
    model = tiny_model(family, device=DEVICE)
    module = sys.modules[type(model.model.layers[0].self_attn).__module__]
    theirs, calls = module.apply_rotary_pos_emb, []

    def spy(q, k, *args, **kwargs):
        calls.append((q.detach().cpu(), k.detach().cpu()))
        return theirs(q, k, *args, **kwargs)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", spy)
    found = capture(model, window(), POSITIONS, block_size=SIZE, layers=[0, 1])
    for i, (q, k) in enumerate(calls[-2:]):  # what comes before them is the check of the rotation
        torch.testing.assert_close(found[i].q_raw.flatten(0, 1), q[0][:, POSITIONS], atol=1e-4, rtol=1e-4)
        blocks = k[0][:, : TOKENS // SIZE * SIZE].unflatten(1, (-1, SIZE))
        pooled = torch.cat((blocks.amax(2), blocks.amin(2), blocks.mean(2)), -1).transpose(0, 1)
        torch.testing.assert_close(found[i].pooled, pooled, atol=1e-4, rtol=1e-4)


def test_a_learned_bias_counts_in_the_forward_and_in_the_masses(monkeypatch):
    """As NOSA defines it: weight ~ exp(q.k * scale + A * softplus(W v)); against plain softmax of each layer's call."""
    model, rng = tiny_model("llama", device=DEVICE), torch.Generator().manual_seed(8)
    specs = layer_specs(model.config)
    heads = {
        s.layer_idx: BiasHead(
            torch.randn(s.num_kv_heads, s.num_kv_heads * s.head_dim, generator=rng).to(DEVICE),
            torch.full((s.num_kv_heads,), 1.5, device=DEVICE),
        )
        for s in specs
    }
    attach_heads(model, heads, NOSA(), token_bias)
    calls = []

    def spy(module, q, k, v, mask, **kwargs):
        out = rheo_attention(module, q, k, v, mask, **kwargs)
        calls.append((q, k, v, out[0]))
        return out

    monkeypatch.setattr("rheo_offload.calibration.capture.rheo_attention", spy)
    found = capture(model, window(), POSITIONS, block_size=SIZE, layers=[0, 1])
    for (i, head), (q, k, v, out) in zip(heads.items(), calls[-2:], strict=True):
        bias, group = head(v)[0], q.shape[1] // k.shape[1]  # [Hkv, S]
        assert bias.std() > 0.1
        k, v = (t[0].repeat_interleave(group, 0) for t in (k, v))
        logits = q[0] @ k.mT * q.shape[-1] ** -0.5 + bias.repeat_interleave(group, 0)[:, None]
        weights = logits.masked_fill(
            torch.ones(TOKENS, TOKENS, device=q.device).triu(1).bool(), -torch.inf
        ).softmax(-1)
        torch.testing.assert_close(out[0].transpose(0, 1), weights @ v, atol=2e-5, rtol=1e-4)
        blocks = weights[:, POSITIONS, : TOKENS // SIZE * SIZE].unflatten(-1, (-1, SIZE)).sum(-1).cpu()
        mass = blocks.unflatten(0, (-1, group)).mean(1).transpose(0, 1)
        torch.testing.assert_close(found[i].mass, mass, atol=2e-5, rtol=1e-4)
        means = bias[:, : TOKENS // SIZE * SIZE].unflatten(1, (-1, SIZE)).mean(2).T.cpu()
        torch.testing.assert_close(found[i].bias, means, atol=2e-5, rtol=1e-4)


def test_the_attention_comes_back_when_the_forward_fails(monkeypatch):
    model = tiny_model("llama")

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        capture(model, window(), POSITIONS, block_size=SIZE, layers=[0])
    assert model.config._attn_implementation == "eager"
