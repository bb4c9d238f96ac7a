"""Side weights: written and read back, refused with every reason at once, and the number they give a token."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from rheo_offload.errors import HeadsError
from rheo_offload.model.learned_heads import (
    BiasHead,
    HeadsFile,
    HeadsInfo,
    bias_heads,
    load_heads,
    read_heads,
    read_own_heads,
    save_heads,
)
from rheo_offload.types import LayerSpec

SPECS = [LayerSpec(layer_idx=i, num_q_heads=4, num_kv_heads=2, head_dim=8) for i in range(3)]
INFO = HeadsInfo.of(SPECS, model_type="llama", method="nosa", provenance="a test")


def random_heads(offset=True, seed=0, specs=SPECS):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        s.layer_idx: BiasHead(
            normal(s.num_kv_heads, s.num_kv_heads * s.head_dim),
            normal(s.num_kv_heads),
            normal(s.num_kv_heads) if offset else None,
        )
        for s in specs
    }


@pytest.mark.parametrize("offset", [True, False], ids=["with offset", "without"])
def test_a_file_gives_back_what_was_saved(tmp_path, offset):
    heads = random_heads(offset)
    save_heads(tmp_path / "heads.safetensors", {i: h.tensors() for i, h in heads.items()}, INFO)
    file = read_heads(tmp_path / "heads.safetensors")
    assert file.info == INFO
    found = bias_heads(file, SPECS, model_type="llama")
    for i, head in heads.items():
        assert torch.equal(found[i].weight, head.weight) and torch.equal(found[i].scale, head.scale)
        assert (found[i].offset is None) == (not offset)
        assert not offset or torch.equal(found[i].offset, head.offset)


def test_tensors_of_another_method_share_the_file(tmp_path):
    layers = {0: {"self_attn.gate.weight": torch.ones(3, 5), "self_attn.A": torch.zeros(2)}}
    save_heads(tmp_path / "gates.safetensors", layers, replace(INFO, method="gates"))
    assert read_heads(tmp_path / "gates.safetensors").layers[0].keys() == layers[0].keys()
    only = read_heads(tmp_path / "gates.safetensors", ["self_attn.gate.weight"])
    assert list(only.layers[0]) == ["self_attn.gate.weight"]


def test_a_checkpoint_directory_is_looked_through(tmp_path):
    """NOSA's checkpoints have the heads among all other weights, in several files and without our metadata."""
    for part, (i, head) in enumerate(random_heads().items()):
        tensors = {f"model.layers.{i}.{name}": t for name, t in head.tensors().items()}
        save_file(tensors | {f"model.layers.{i}.mlp.weight": torch.ones(2)}, tmp_path / f"{part}.safetensors")
    file = read_heads(tmp_path, random_heads()[0].tensors())
    assert file.info is None and all("mlp.weight" not in named for named in file.layers.values())
    assert bias_heads(file, SPECS, model_type="anything").keys() == {0, 1, 2}


def test_every_reason_is_named_at_once(tmp_path):
    layers = {i: h.tensors() for i, h in random_heads().items()}
    del layers[0]["self_attn.A"]
    layers[1]["self_attn.delta.weight"] = torch.ones(2, 3)
    layers[2]["self_attn.delta.bias"] = torch.tensor([0.0, torch.nan])
    save_heads(tmp_path / "h.safetensors", layers, replace(INFO, model_type="qwen3", num_layers=7))
    with pytest.raises(HeadsError) as error:
        bias_heads(read_heads(tmp_path / "h.safetensors"), SPECS, model_type="llama")
    assert len(error.value.reasons) == 5
    for part in (
        "made for model_type qwen3, the model has llama",
        "made for num_layers 7, the model has 3",
        "layers.0.self_attn.A is missing",
        "layers.1.self_attn.delta.weight is [2, 3], not [2, 16]",
        "layers.2.self_attn.delta.bias holds NaN",
    ):
        assert part in str(error.value)


def test_sliding_layers_have_no_head():
    specs = [replace(SPECS[0], window=16), *SPECS[1:]]
    file = HeadsFile({i: h.tensors() for i, h in random_heads(specs=specs[1:]).items()}, None)
    assert bias_heads(file, specs, model_type="llama").keys() == {1, 2}


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for path, reason in (
        (tmp_path / "text.safetensors", "cannot read"),
        (tmp_path / "absent.safetensors", "cannot read"),
    ):
        with pytest.raises(HeadsError, match=reason):
            read_heads(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HeadsError, match="holds no safetensors file"):
        read_heads(tmp_path / "empty")
    save_file(
        {"x": torch.ones(1)}, tmp_path / "half.safetensors", {"format": "rheo-heads-1", "num_layers": "3"}
    )
    with pytest.raises(HeadsError, match="lacks a usable model_type"):
        read_heads(tmp_path / "half.safetensors")


def test_the_models_own_heads_are_found():
    """NOSA's own model classes have the head as modules and parameters of the attention."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList()
    for _ in SPECS:
        layer = torch.nn.Module()
        layer.self_attn = torch.nn.Module()
        layer.self_attn.delta = torch.nn.Linear(16, 2)
        layer.self_attn.A = torch.nn.Parameter(torch.ones(2))
        model.layers.append(layer)
    found = load_heads(None, model.to(torch.bfloat16), SPECS, model_type="llama")
    assert torch.equal(found[1].weight, model.layers[1].self_attn.delta.weight)
    assert found[1].weight.dtype == torch.bfloat16 and found[1].scale.dtype == torch.float32
    assert read_own_heads(torch.nn.Linear(2, 2), ["self_attn.A"]).layers == {}
    with pytest.raises(HeadsError, match="weights names no file"):
        load_heads(None, torch.nn.Linear(2, 2), SPECS, model_type="llama")


def test_the_bias_of_a_token():
    """A * softplus(W v + c), v all KV heads' values of the token one after the other."""
    head, v = random_heads()[0], torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    bias = head(v)
    assert bias.shape == (2, 2, 5) and bias.dtype == torch.float32
    for b, h, t in ((0, 0, 0), (1, 1, 4)):
        joined = torch.cat([v[b, 0, t], v[b, 1, t]]).double()
        x = float(head.weight[h].double() @ joined + head.offset[h])
        expected = float(head.scale[h]) * torch.log1p(torch.exp(torch.tensor(x, dtype=torch.float64)))
        assert float(bias[b, h, t]) == pytest.approx(float(expected), rel=1e-5)
