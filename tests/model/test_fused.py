"""Fused decoder layers: tokens and logits as the model's own, one copy of the weights, undone without a trace."""

import copy

import pytest
import torch
from torch import nn

from csrc_free_kernels import launch
from rheo_offload import RheoConfig, UnsupportedModelError, offload, restore
from rheo_offload.model import fused
from rheo_offload.model.fused import STATE, fuse, unfuse
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import FAMILIES, tiny_model
from tests.helpers.tolerance import assert_close

OTHERS = {"qwen3_moe", "gpt_oss", "olmo2", "glm4"}
FUSED = [family for family in FAMILIES if family not in OTHERS]
# What the tiny models leave at its default, where the layers take another path.
VARIANTS = {
    "llama-biased": ("llama", dict(attention_bias=True)),
    "smollm3-nope": ("smollm3", dict(no_rope_layers=[1, 0])),
    "phi3-partial": (
        "phi3",
        dict(
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            partial_rotary_factor=0.5,
        ),
    ),
}
MODELS = {family: (family, {}) for family in FUSED} | VARIANTS


def config(**execution):
    return RheoConfig.from_dict(
        {
            "cache": {"block_size": 16, "host_memory": "64MiB"},
            "selection": {"token_budget": 256, "recent_blocks": 2},
            "prefill": {"chunk_tokens": 32},
            "execution": execution,
        }
    )


def batch(lengths=(45, 20)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        mask[row, :-n] = ids[row, :-n] = 0
    return ids.to(DEVICE), mask.to(DEVICE)


def logits(model):
    ids, mask = batch()
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[mask.bool()]


def greedy(model):
    ids, mask = batch()
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)


def named(name, **kwargs):
    """Build a model whose norms have different weights, so that one for another shows."""
    family, overrides = MODELS[name]
    model = tiny_model(family, device=DEVICE, **overrides, **kwargs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "norm" in parameter_name:
                p += (0.3 * torch.randn(p.shape, generator=generator)).to(p)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_offloaded_tokens_equal_stock(name):
    """fp32, full budget, a left-padded batch: prompt in chunks and decode steps through the fused layers."""
    model = named(name)
    expected = greedy(model)
    offload(model, config(fused="on"))
    assert model.rheo.fused.is_complete and len(model.rheo.fused.fused) == len(model.model.layers) + 1
    assert torch.equal(greedy(model), expected)
    restore(model)
    assert not any(STATE in m.__dict__ for m in model.modules())
    assert torch.equal(greedy(model), expected)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_logits_keep_the_tolerance_rule(name):
    model = named(name, dtype=torch.bfloat16)
    stock, own = logits(model), dict(model.named_parameters())
    fuse(model)
    exact = named(name)  # fp32: the modeling files compute norms in it whatever the dtype
    exact.load_state_dict(model.state_dict())
    assert_close(logits(model), logits(exact), stock, torch.bfloat16)
    assert all(own[n] is p for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_unfuse_leaves_no_trace(family):
    model = tiny_model(family, device=DEVICE)
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    first = logits(model)
    fuse(model)
    assert {name for name, m in model.named_modules() if set(m.__dict__) != before[name]}
    unfuse(model)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before
    assert torch.equal(logits(model), first)


@pytest.fixture
def few_rows(monkeypatch):
    """Puts the weights of a model into the launch table; gives the (shape of the weight, added) of every call."""
    calls, before = [], list(launch.entries())
    kernels_for = fused.kernels_for

    def spied(*args):
        ops = kernels_for(*args)
        own = ops.linear_few

        def linear_few(x, weight, out, *, add):
            calls.append((tuple(weight.shape), add))
            own(x, weight, out, add=add)

        ops.linear_few = linear_few
        return ops

    def tell(model, max_rows, names=("qkv", "o", "gate_up", "down", "head")):
        layer = model.model.layers[0]
        state = layer.__dict__[STATE]
        weights = {
            "qkv": state.qkv.weight, "o": layer.self_attn.o_proj.weight, "gate_up": state.gate_up.weight,
            "down": layer.mlp.down_proj.weight, "head": model.lm_head.weight,
        }  # fmt: skip
        use = dict(block_n=16, block_k=64, num_warps=4, num_stages=2, max_rows=max_rows)
        for (n, k), itemsize in {
            (tuple(w.shape), w.itemsize) for name, w in weights.items() if name in names
        }:
            launch.put("linear_few", model.device, 0, {"n": n, "k": k, "itemsize": itemsize}, use)
        return {name: tuple(w.shape) for name, w in weights.items()}

    monkeypatch.setattr(fused, "kernels_for", spied)
    yield tell, calls
    launch.replace(before)


FEW = ["llama", "llama-tied", "llama-biased", "qwen2", "phi3", "gemma3", "granite"]


@pytest.mark.parametrize("name", FEW)
def test_products_of_few_rows(name, few_rows):
    """Decode steps of two rows: every product without a bias or a multiplier goes to the op; the tokens stay stock."""
    tell, calls = few_rows
    tied = {"tie_word_embeddings": True} if name == "llama-tied" else {}
    model = named(name.removesuffix("-tied"), **tied)
    expected = greedy(model)
    offload(model, config(fused="on"))
    assert torch.equal(greedy(model), expected) and not calls
    shapes = tell(model, max_rows=2)
    assert torch.equal(greedy(model), expected)
    first = model.model.layers[0]
    state = first.__dict__[STATE]
    wanted = {(shapes["gate_up"], False), (shapes["head"], False)}
    wanted |= {(shapes["qkv"], False)} if state.qkv.bias is None else set()
    wanted |= {(shapes["o"], False)} if first.self_attn.o_proj.bias is None else set()
    if state.multiplier == 1:
        wanted.add((shapes["down"], not state.family.sandwich))
    assert set(calls) == wanted
    calls.clear()
    restore(model)
    assert torch.equal(greedy(model), expected) and not calls
    assert not any(STATE in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


def test_products_that_the_table_does_not_name_are_torchs(few_rows):
    """More rows than an entry's, weights without one, gradients, autocast: not the op. The logits stay stock."""
    tell, calls = few_rows
    model = tiny_model("llama", device=DEVICE)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]], device=DEVICE)  # six rows
    with torch.no_grad():
        own = model(ids).logits
        fuse(model)
        shapes = tell(model, max_rows=5)
        assert torch.allclose(model(ids).logits, own, atol=1e-4) and not calls
        with torch.autocast(DEVICE, torch.bfloat16):
            model(ids[:1])
    model(ids[:1])
    assert not calls
    with torch.no_grad():
        tell(model, max_rows=6, names=("down",))
        assert torch.allclose(model(ids).logits, own, atol=1e-4)
    assert calls == [(shapes["down"], True)] * len(model.model.layers)


def test_the_op_takes_part_in_the_check_at_attach(few_rows, monkeypatch):
    """A kernel that computes something else is found, like any other part of the fused forward."""
    tell, _ = few_rows
    model = tiny_model("llama", device=DEVICE)
    fuse(model)
    tell(model, max_rows=16)
    unfuse(model)
    monkeypatch.setattr(
        "csrc_free_kernels.reference.linear_few.linear_few"
        if DEVICE == "cpu"
        else "csrc_free_kernels.gpu.linear_few.linear_few",
        lambda x, weight, out, *, add: out.zero_(),
    )
    report = fuse(model)
    assert not report.fused and "differs from its own" in report.left["model.layers.0"]
    assert "forward" not in model.lm_head.__dict__


def test_an_output_embedding_that_is_more_than_a_linear_is_left_alone():
    model = tiny_model("llama", device=DEVICE)
    model.lm_head = Wrapped(model.lm_head)
    before = logits(model)
    assert fuse(model).is_complete
    assert STATE not in model.lm_head.__dict__ and STATE not in model.lm_head.base.__dict__
    assert torch.allclose(logits(model), before, atol=1e-3)


def test_hooks_on_linears_still_run():
    """Where a forward was replaced on the module, what is registered on it later counts as before."""
    model, seen = tiny_model("llama", device=DEVICE), []
    fuse(model)
    for module in (model.lm_head, model.model.layers[0].self_attn.o_proj):
        module.register_forward_hook(lambda module, *args: seen.append(module))
    logits(model)
    assert seen == [model.model.layers[0].self_attn.o_proj, model.lm_head]


def test_there_is_one_copy_of_the_weights(tmp_path):
    """Every merged weight is the memory of its parts; saving and loading go on as before."""
    model = tiny_model("qwen2", device=DEVICE)
    saved = copy.deepcopy(model.state_dict())
    fuse(model)
    for layer in model.model.layers:
        state = layer.__dict__[STATE]
        for merged in (state.qkv, state.gate_up):
            parts = [getattr(merged.owner, name) for name in merged.names]
            for whole, pieces in (
                (merged.weight, [p.weight for p in parts]),
                (merged.bias, [p.bias for p in parts]),
            ):
                if whole is None:
                    assert pieces == [None] * len(parts)
                    continue
                assert torch.equal(whole, torch.cat(pieces))
                assert {p.untyped_storage().data_ptr() for p in pieces} == {
                    whole.untyped_storage().data_ptr()
                }
                assert whole.untyped_storage().nbytes() == sum(p.nbytes for p in pieces)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())

    state = model.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[n], saved[n]) for n in saved)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").to(DEVICE).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-3)


@pytest.mark.parametrize("change", ["load", "assign", "dtype", "copy"])
def test_changed_weights_are_used(change):
    """The merged buffer never goes stale: in-place loads, new tensors, another dtype, a deep copy."""
    model, other = tiny_model("llama", device=DEVICE), tiny_model("llama", seed=7, device=DEVICE)
    fuse(model)
    if change == "dtype":
        model.to(torch.float16).to(torch.float32)
        other.to(torch.float16).to(torch.float32)
        model.load_state_dict(other.state_dict())
    elif change == "copy":
        model = copy.deepcopy(model)
        model.load_state_dict(other.state_dict())
    else:
        state = {k: v.clone() for k, v in other.state_dict().items()}
        model.load_state_dict(state, assign=change == "assign")
    assert torch.allclose(logits(model), logits(other), atol=1e-3)


def test_two_trees_over_the_same_parameters_share_the_buffer():
    """A module tree over the same parameters, fused on its own, moves nothing."""
    model = tiny_model("llama", device=DEVICE)
    view = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    fuse(model)
    where = [p.data_ptr() for p in model.parameters()]
    fuse(view)
    assert torch.equal(logits(view), logits(model))
    assert [p.data_ptr() for p in model.parameters()] == where


def test_hidden_states_are_not_overwritten():
    """The residual stream is updated in place inside a layer, but never what the layer was given or has returned."""
    model = tiny_model("llama", device=DEVICE)
    ids, mask = batch()
    with torch.no_grad():
        own = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        fuse(model)
        ours = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for a, b in zip(ours.hidden_states + ours.attentions, own.hidden_states + own.attentions, strict=True):
        assert torch.allclose(a[mask[:, 0].bool()], b[mask[:, 0].bool()], atol=1e-4)


def test_gradients_run_the_models_own_forward():
    """Also after fusing under inference mode, which must not leave inference tensors behind."""
    model, ids = tiny_model("llama", device=DEVICE), batch()[0][:1]
    own = torch.autograd.grad(model(ids).logits.sum(), model.model.layers[0].self_attn.q_proj.weight)[0]
    with torch.inference_mode():
        fuse(model)
    got = torch.autograd.grad(model(ids).logits.sum(), model.model.layers[0].self_attn.q_proj.weight)[0]
    assert torch.equal(got, own)


def test_autocast_runs_the_models_own_forward():
    model, ids = tiny_model("llama", device=DEVICE), batch()[0][:1]
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        own = model(ids).logits
        fuse(model)
        assert torch.equal(model(ids).logits, own)


def test_a_failure_inside_the_fused_forward_leaves_the_layer_as_it_was(monkeypatch):
    monkeypatch.setattr(fused, "_activated", lambda *args: 1 / 0)
    model = tiny_model("llama", device=DEVICE)
    with pytest.raises(ZeroDivisionError):
        fuse(model)
    assert not any(STATE in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


class Wrapped(nn.Module):
    """A stand-in for an adapter: a module with a weight that is more than a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return 2 * self.base(x)


def _wrap(layer):
    layer.self_attn.k_proj = Wrapped(layer.self_attn.k_proj)


def _tie(layer):
    layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight


def _add_a_bias(layer):
    layer.self_attn.k_proj.bias = nn.Parameter(
        torch.zeros(layer.self_attn.k_proj.out_features, device=DEVICE)
    )


def _add_a_down_bias(layer):
    layer.mlp.down_proj.bias = nn.Parameter(torch.zeros(layer.mlp.down_proj.out_features, device=DEVICE))


def _override(layer):
    layer.mlp.forward = lambda x: x


CHANGES = {
    "adapter": (_wrap, "k_proj is a Wrapped, not a plain Linear"),
    "hook": (lambda x: x.mlp.register_forward_hook(lambda *a: None), "mlp has hooks"),
    "attention-hook": (lambda x: x.self_attn.register_forward_hook(lambda *a: None), "self_attn has hooks"),
    "own-forward": (_override, "mlp has a forward of its own already"),
    "compiled": (lambda x: x.compile(), "the layer is compiled"),
    "dtype": (lambda x: x.input_layernorm.to(torch.float64), "mixes or wraps parameters"),
    "some-bias": (_add_a_bias, "only some of self_attn.q_proj"),
    "down-bias": (_add_a_down_bias, "mlp.down_proj has a bias"),
    "tied": (_tie, "shares parameters with another module"),
    "activation": (lambda x: setattr(x.mlp, "act_fn", nn.ReLU()), "activation ReLU has no fused form"),
    "missing": (lambda x: delattr(x.self_attn, "scaling"), "an attribute is missing"),
    "no-norm": (lambda x: delattr(x, "post_attention_layernorm"), "its parts are not as expected"),
    "heads": (lambda x: setattr(x.self_attn, "head_dim", 8), "its projections give 128 channels"),
    "eps": (lambda x: setattr(x.input_layernorm, "variance_epsilon", 1.0), "different eps"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_not_as_expected_is_left_alone(change):
    do, reason = CHANGES[change]
    model = tiny_model("llama", device=DEVICE)
    do(model.model.layers[1])
    report = fuse(model)
    assert set(report.left) == {"model.layers.1"} and reason in report.left["model.layers.1"]
    assert report.fused == ("model.layers.0",)
    assert STATE not in model.model.layers[1].__dict__ and STATE not in model.model.norm.__dict__


def test_a_forward_that_computes_something_else_is_found(monkeypatch):
    """Same names and types, another formula: as after an upgrade. The layer keeps its own."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
    )
    model = tiny_model("llama", device=DEVICE)
    before = logits(model)
    report = fuse(model)
    assert not report.fused and "differs from its own" in report.left["model.layers.0"]
    assert torch.equal(logits(model), before)
    assert not any(STATE in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


def test_wrapping_after_fusing_is_refused():
    model = tiny_model("llama", device=DEVICE)
    fuse(model)
    _wrap(model.model.layers[0])
    with pytest.raises(UnsupportedModelError, match="k_proj became a Wrapped"):
        logits(model)


def test_configured():
    """`on` refuses other families and changes nothing, `auto` leaves them alone and needs a GPU, `off` is off."""
    for family in ("llama", "olmo2"):
        for mode in ("auto", "off"):
            model = tiny_model(family, device=DEVICE)
            offload(model, config(fused=mode))
            expected = family == "llama" and mode == "auto" and DEVICE == "cuda"
            assert any(STATE in m.__dict__ for m in model.modules()) == expected
            restore(model)
    with pytest.raises(UnsupportedModelError, match="fused=on: the model: Olmo2ForCausalLM is of no family"):
        offload(model, config(fused="on"))
    assert "rheo" not in model.__dict__ and model.config._attn_implementation == "eager"


def test_on_is_all_or_nothing():
    model = tiny_model("llama", device=DEVICE)
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    with pytest.raises(UnsupportedModelError, match="fused=on: model.layers.1: activation ReLU"):
        fused.fuse_as_configured(model, "on")
    assert not any(STATE in m.__dict__ for m in model.modules())


def test_a_failed_offload_takes_the_fused_forwards_off(monkeypatch):
    def fail(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("rheo_offload.model.offload.self_test", fail)
    model = tiny_model("llama", device=DEVICE)
    with pytest.raises(RuntimeError, match="out of luck"):
        offload(model, config(fused="on"))
    assert not any(STATE in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


def test_report_groups_the_reasons():
    report = fused.FusedReport(("a",), {"x.0": "is odd", "x.1": "is odd", "x.2": "has hooks"})
    assert report.reasons() == ["x.0 (and 1 more): is odd", "x.2: has hooks"]
    assert str(report) == "fused forward on 1 modules; not on x.0 (and 1 more): is odd; x.2: has hooks"
