"""The learned gate against its definition written out plainly, through the whole data path; what is refused."""

import re

import pytest
import torch

from rheo_offload import Engine, RheoConfig, SamplingParams, offload
from rheo_offload.errors import ConfigError, HeadsError
from rheo_offload.model.gates import GATE_TENSORS, KEY, KEY_NORM, QUERY, QUERY_NORM
from rheo_offload.model.learned_heads import HeadsInfo, save_heads
from rheo_offload.model.specs import layer_specs
from rheo_offload.selection.policy import make_policy, make_selector
from rheo_offload.types import AttentionCall
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerance import assert_close
from tests.selection.test_scorers import plain_blocks
from tests.test_end_to_end import BLOCK, greedy, prompt, sparse_config

C, SINK, RECENT, BUDGET, SCALE = 32, 1, 2, 7, 0.25


def gate_weights(specs, *, norms=True, seed=5):
    """Random gates of the full-attention layers: layer_idx -> name -> tensor."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for s in specs:
        d = s.head_dim
        shapes = {QUERY: (s.num_kv_heads, s.group_size, d, d), KEY: (s.num_kv_heads, 3 * d, d)}
        if norms:
            shapes |= {QUERY_NORM: (d,), KEY_NORM: (d,)}
        if not s.is_sliding:
            layers[s.layer_idx] = {
                n: torch.randn(*shape, generator=generator) / 6 for n, shape in shapes.items()
            }
    return layers


def gate_file(path, model, layers=None, **kwargs):
    """Write a side file for a model."""
    specs = layer_specs(model.config)
    info = HeadsInfo.of(specs, model_type=model.config.model_type, method="seer_r", provenance="random")
    save_heads(path, gate_weights(specs, **kwargs) if layers is None else layers, info)
    return str(path)


def seer_config(weights, **groups):
    groups["selection"] = groups.get("selection", {}) | {"params": {"weights": weights}}
    return sparse_config("seer_r", **groups)


# ---- the definition, for one KV head, in the dtype of its inputs ---------------------------------------------------


def turned(x, positions, model, layer):
    """Rotate x [..., D] to `positions` [...], a pair of channels at a time, with fp64 angles."""
    attention, rotary = model.model.layers[layer].self_attn, model.model.rotary_emb
    freq = rotary.inv_freq.double().cpu()
    half, scaling = len(freq), float(rotary.attention_scaling)
    interleaved = "Glm" in type(attention).__name__
    out = x.clone()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        cos, sin = torch.cos(positions * freq[i]), torch.sin(positions * freq[i])
        out[..., a] = scaling * (x[..., a] * cos - x[..., b] * sin)
        out[..., b] = scaling * (x[..., b] * cos + x[..., a] * sin)
    return out


def normed(x, weight):
    return x if weight is None else x / (x.square().mean() + 1e-6).sqrt() * weight.to(x.dtype)


def plain_gate(named, head, model, layer, q_raw, position, k_raw):
    """Scores [closed] of a KV head: raw (unrotated) queries [G, D] at `position`, raw keys [T, D]."""
    w_q, w_k = (named[name][head].to(k_raw.dtype) for name in (QUERY, KEY))
    gate_q = sum(q_raw[g] @ w_q[g] for g in range(len(q_raw)))
    at = torch.tensor(position, dtype=torch.float64)
    gate_q = turned(normed(gate_q, named.get(QUERY_NORM)), at, model, layer)
    logits = []
    for n in range(k_raw.shape[0] // C):
        block = k_raw[n * C : (n + 1) * C]
        pooled = torch.cat((block.amax(0), block.amin(0), block.mean(0)))
        at = torch.tensor(n * C, dtype=torch.float64)
        gate_k = turned(normed(pooled @ w_k, named.get(KEY_NORM)), at, model, layer)
        logits.append(gate_q @ gate_k / gate_q.shape[0] ** 0.5)
    return torch.stack(logits).softmax(0) if logits else k_raw.new_zeros(0)


def rotated(raw, start, model, layer):
    """Rotate raw [H, T, D] to positions start .. start + T - 1."""
    positions = torch.arange(start, start + raw.shape[1], dtype=torch.float64)
    return turned(raw.double(), positions, model, layer).to(raw.dtype)


def there_and_back(raw, start, model, layer):
    """What fp32 leaves of raw [H, T, D] once it has been rotated and taken back."""
    positions = torch.arange(start, start + raw.shape[1], dtype=torch.float32)
    scaling = float(model.model.rotary_emb.attention_scaling)
    back = turned(rotated(raw, start, model, layer), -positions, model, layer)
    used = 2 * len(model.model.rotary_emb.inv_freq)
    return torch.cat((back[..., :used] / scaling**2, back[..., used:]), -1)


@pytest.mark.parametrize(
    ("family", "norms", "share"),
    [("llama", True, 0.0), ("llama", False, 0.5), ("glm4", True, 0.0), ("gpt_oss", True, 0.0)],
)
def test_a_step_scores_and_selects_as_defined(tmp_path, family, norms, share):
    """A prompt in ragged chunks, then steps across a block border: the scores of every row, and its blocks.

    GLM-4 rotates a part of the channels, interleaved; GPT-OSS scales what it rotates.
    """
    model = tiny_model(family, device=DEVICE)
    specs = layer_specs(model.config)
    layer = next(s.layer_idx for s in specs if not s.is_sliding)
    selection = {"token_budget": BUDGET * C, "recent_blocks": RECENT, "query_agnostic_share": share}
    weights = gate_file(tmp_path / "gates.safetensors", model, norms=norms)
    named = gate_weights(specs, norms=norms)[layer]
    offload(model, seer_config(weights, cache={"block_size": C}, selection=selection, audit={"every": 0}))
    lengths, steps = [10 * C - 2, 3 * C + 7], 4
    ex = model.rheo._make_executor(2, lengths[0] + steps, torch.float32, torch.device(DEVICE))
    draw = torch.Generator().manual_seed(0)

    def new(heads, tokens):
        return torch.randn(heads, tokens, 16, generator=draw)

    rows = [new(2, n) for n in lengths]
    for b, length in enumerate(lengths):
        for first, end in ((0, 2 * C + 1), (2 * C + 1, 2 * C + 9), (2 * C + 9, length)):
            ex.begin_prefill(slice(b, b + 1), [first], end - first)
            k = rotated(rows[b][:, first:end], first, model, layer)[None].to(DEVICE)
            q = rotated(new(4, 1), end - 1, model, layer)[None].expand(-1, -1, end - first, -1).to(DEVICE)
            for i in range(len(specs)):
                ex.forward(i, AttentionCall(q, k, k, SCALE))
    policy = make_policy(
        selector=ex.selector, block_budget=BUDGET, sink_blocks=SINK, recent_blocks=RECENT,
        query_agnostic_share=share, heat_decay=0.98,
    )  # fmt: skip
    for _ in range(steps):
        ex.begin_decode()
        k_raw, q_raw = [new(2, 1) for _ in rows], [new(4, 1) for _ in rows]
        rows = [torch.cat((old, k), 1) for old, k in zip(rows, k_raw, strict=True)]
        last = [r.shape[1] - 1 for r in rows]
        q, k = (
            torch.stack([rotated(x, p, model, layer) for x, p in zip(raw, last, strict=True)]).to(DEVICE)
            for raw in (q_raw, k_raw)
        )
        for i in range(layer + 1):
            ex.forward(i, AttentionCall(q, k, k, SCALE))
        ws = ex.workspace_of(ex.cache.full[layer])
        scores, selected = ws.block_scores.clone(), ws.selected_blocks.clone()
        for i in range(layer + 1, len(specs)):
            ex.forward(i, AttentionCall(q, k, k, SCALE))
        for b, raw in enumerate(rows):
            q32 = there_and_back(q_raw[b], last[b], model, layer)[:, 0]
            k32 = there_and_back(raw, 0, model, layer)
            for h in range(2):
                group = slice(2 * h, 2 * h + 2)
                truth = plain_gate(
                    named, h, model, layer, q_raw[b][group, 0].double(), last[b], raw[h].double()
                )
                same = plain_gate(named, h, model, layer, q32[group], last[b], k32[h])
                assert_close(scores[b, h, : len(truth)], truth, same, torch.float32)
                assert (scores[b, h, len(truth) :] == -torch.inf).all(), "an open block has no score"
                best = plain_blocks(truth, raw.shape[1], policy.query_blocks)
                got = [n for n in selected[b, h].tolist() if n >= 0]
                assert set(best) <= set(got) and len(got) == min(BUDGET, -(-raw.shape[1] // C))
                assert share > 0 or got == best
    ex.cache.check_integrity()


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "phi3"])
def test_full_budget_equals_stock(tmp_path, family):
    model, ids = tiny_model(family, device=DEVICE), prompt(150)
    expected = greedy(model, ids)
    weights = gate_file(tmp_path / "g.safetensors", model)
    offload(model, seer_config(weights, cache={"block_size": C}, selection={"token_budget": 6 * C}))
    assert torch.equal(greedy(model, ids), expected)


def test_it_runs_sparse_with_a_dense_layer_and_the_audit(tmp_path):
    """A gate is wanted for the layers that select only; a row alone selects what it selects in a ragged batch."""
    model = tiny_model("llama", device=DEVICE)
    layers = gate_weights(layer_specs(model.config))
    weights = gate_file(tmp_path / "g.safetensors", model, {0: layers[0]})
    offload(model, seer_config(weights, selection={"dense_layers": [1]}, audit={"every": 3}))
    ids, mask = prompt(300, rows=2), torch.ones(2, 300, dtype=torch.long, device=DEVICE)
    mask[1, :170] = 0
    together = greedy(model, ids, attention_mask=mask)
    stats = model.rheo.stats()
    assert stats.miss_blocks > 0 and 0 < stats.captured_mass_min <= stats.captured_mass_mean < 1
    assert torch.equal(greedy(model, ids[1:, 170:])[0, 130:], together[1, 300:])


def test_a_row_that_sits_a_step_out_keeps_its_gate_keys(tmp_path):
    """Two rows, nothing resident; one decodes: it gets the key of the block it closes, the other row none."""
    model = tiny_model("llama", device=DEVICE)
    selection = {"sink_blocks": 0}
    offload(model, seer_config(gate_file(tmp_path / "g.safetensors", model), selection=selection))
    ex = model.rheo._make_executor(2, 200, torch.float32, torch.device(DEVICE))
    tokens = 4 * BLOCK - 1
    for b in range(2):
        ex.begin_prefill(slice(b, b + 1), [0], tokens)
        q, k = torch.randn(1, 4, tokens, 16).to(DEVICE), torch.randn(1, 2, tokens, 16).to(DEVICE)
        for layer in range(2):
            ex.forward(layer, AttentionCall(q, k, k, SCALE))
    ex.cache.drop_blocks()
    layer, pages = ex.cache.full[0], [p[:4] for p in ex.cache.pages]
    before = layer.summary.clone()
    ex.cache.active[1] = 0
    ex.begin_decode_on_host([0])
    ex.cache.after_decode([0])
    ex.begin_decode_on_device(2)
    q, k = torch.randn(2, 4, 1, 16).to(DEVICE), torch.randn(2, 2, 1, 16).to(DEVICE)
    for i in range(2):
        ex.forward(i, AttentionCall(q, k, k, SCALE))
    assert torch.equal(layer.summary[pages[1][:3]], before[pages[1][:3]])
    assert torch.equal(layer.summary[pages[0][:3]], before[pages[0][:3]])
    keys = layer.k_host[pages[0][3]][None].to(DEVICE)
    made = model.rheo._selector.for_layer(0).summarize(keys, torch.tensor([3], device=DEVICE))
    torch.testing.assert_close(layer.summary[pages[0][3]], made[0])


def test_rows_that_come_and_go_keep_their_gate_keys(tmp_path):
    """An engine of two rows, four requests over block borders: rows that sit a step out are written to by nobody."""
    model = tiny_model("llama", device=DEVICE)
    no_heat = {"selection": {"query_agnostic_share": 0.0, "sink_blocks": 0}, "audit": {"every": 0}}
    offload(model, seer_config(gate_file(tmp_path / "g.safetensors", model), **no_heat))
    wanted = [(150, 20), (31, 5), (200, 12), (97, 30)]
    prompts = [prompt(n, seed=i)[0].cpu() for i, (n, _) in enumerate(wanted)]
    expected = [
        greedy(model, ids[None].to(DEVICE), new=new, eos_token_id=None)[0, len(ids) :].tolist()
        for ids, (_, new) in zip(prompts, wanted, strict=True)
    ]
    with Engine(model, max_rows=2, max_context_tokens=256) as engine:
        options = [SamplingParams(max_new_tokens=new, ignore_eos=True) for _, new in wanted]
        requests = [engine.submit(ids, o) for ids, o in zip(prompts, options, strict=True)]
        while not engine.is_idle:
            engine.step()
        assert [r.output_ids for r in requests] == expected


def test_weights_change_what_is_selected(tmp_path):
    found = []
    for seed in (1, 2):
        model = tiny_model("llama", device=DEVICE)
        weights = gate_file(tmp_path / f"{seed}.safetensors", model, seed=seed)
        offload(model, seer_config(weights, selection={"query_agnostic_share": 0.0}))
        cache = model.rheo.new_cache(max_length=330)
        greedy(model, prompt(300), past_key_values=cache)
        ex = cache.executor
        found.append(ex.workspace_of(ex.cache.full[0]).selected_blocks.clone())
    assert not torch.equal(*found)


# ---- refusals ------------------------------------------------------------------------------------------------------


def broken(layers):
    """Every defect at once: a layer without gates, a wrong shape, NaN, one norm of two."""
    del layers[1]
    layers[0][QUERY] = layers[0][QUERY][:, :1]
    layers[0][KEY][0, 0, 0] = torch.nan
    del layers[0][KEY_NORM]
    return layers


def test_every_reason_is_given_before_the_model_is_touched(tmp_path):
    model = tiny_model("llama")
    before = model.config._attn_implementation
    weights = gate_file(tmp_path / "g.safetensors", model, broken(gate_weights(layer_specs(model.config))))
    with pytest.raises(HeadsError) as refused:
        offload(model, seer_config(weights))
    text = "\n".join(refused.value.reasons)
    for reason in (
        f"layers.1.{QUERY} is missing",
        f"layers.1.{KEY} is missing",
        f"layers.0.{QUERY} is [2, 1, 16, 16], not [2, 2, 16, 16]",
        f"layers.0.{KEY} holds NaN or infinity",
        f"layers.0 has only one of {QUERY_NORM} and {KEY_NORM}",
    ):
        assert reason in text
    assert not hasattr(model, "rheo") and model.config._attn_implementation == before


def test_a_rotation_that_cannot_be_undone_is_refused(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    model = tiny_model("llama")
    weights = gate_file(tmp_path / "g.safetensors", model)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))
    with pytest.raises(HeadsError, match="layer 0: LlamaAttention rotates in a way that is not undone here"):
        offload(model, seer_config(weights))
    del model.model.rotary_emb
    with pytest.raises(HeadsError, match="layer 1: its rotary embedding is not as expected"):
        offload(model, seer_config(weights))


def test_a_file_of_another_model_or_none_is_refused(tmp_path):
    model = tiny_model("llama")
    other = gate_file(tmp_path / "g.safetensors", tiny_model("qwen2"))
    with pytest.raises(HeadsError, match="model_type qwen2, the model has llama"):
        offload(model, seer_config(other))
    with pytest.raises(HeadsError, match=re.escape("needs selection.params.weights")):
        offload(model, sparse_config("seer_r"))
    with pytest.raises(ConfigError, match=re.escape("selection.params.weights must be a file or directory")):
        make_selector("seer_r", {"weights": str(tmp_path / "nothing")}, block_size=32)
    with pytest.raises(ConfigError, match="with_gates"):
        make_selector("seer_r", {}, block_size=32).score()


def test_published_names_are_read(tmp_path):
    """A checkpoint without our metadata, its tensors in bf16 beside the model's own."""
    from safetensors.torch import save_file

    model = tiny_model("qwen3", device=DEVICE)
    layers = gate_weights(layer_specs(model.config))
    tensors = {f"model.layers.{i}.{n}": t.bfloat16() for i, named in layers.items() for n, t in named.items()}
    save_file(tensors | {"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    offload(model, seer_config(str(tmp_path)))
    assert greedy(model, prompt(300)).shape == (1, 324)
    assert set(GATE_TENSORS) == set(layers[0])
    assert RheoConfig.from_dict(model.rheo.config.to_dict()) == model.rheo.config
