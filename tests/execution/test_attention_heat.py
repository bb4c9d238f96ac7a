"""Heat from attention, and the eviction policies that it ranks: against dense softmax, step by step."""

import pytest
import torch

from rheo_offload import ConfigError, RheoConfig, offload
from rheo_offload.execution import decode
from rheo_offload.execution.attention_heat import PromptMass
from rheo_offload.execution.prefill import HEAT_QUERIES
from rheo_offload.selection.base import normalised
from rheo_offload.selection.heat_ranked import AttentionHeat
from rheo_offload.selection.policy import make_policy, make_selector
from rheo_offload.types import AttentionCall
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.model.test_families import batch, drop_before_every_step
from tests.test_end_to_end import BLOCK, greedy, prompt, sparse_config

EVICTING = {"h2o": AttentionHeat(1.0), "tova": AttentionHeat(0.0, layer_wide=True), "snapkv": None}


def config(method="mean_key", budget_blocks=6, **groups):
    selection = {} if method in EVICTING else {"heat_from": "attention", "query_agnostic_share": 0.5}
    return sparse_config(method, budget_blocks, selection=selection, **groups)


def weights_of(layer, call, rows):
    """Attention weights [B, Hkv, N] of this step's query over all blocks, from the host store."""
    heads = layer.spec.num_kv_heads
    table = rows.host_table.long().clamp(min=0).cpu()
    k = layer.k_host.cpu()[table].transpose(1, 2)  # [B, Hkv, N, C, D]
    q = call.q[:, :, 0].float().cpu().unflatten(1, (heads, -1))
    x = call.softmax_scale * torch.einsum("bhgd,bhncd->bhgnc", q, k)
    if call.soft_cap is not None:
        x = call.soft_cap * torch.tanh(x / call.soft_cap)
    pos = torch.arange(k.shape[2] * k.shape[3]).view(k.shape[2:4])
    return x.masked_fill(pos >= rows.step_lens.cpu()[:, None, None, None, None], -torch.inf)


@pytest.mark.parametrize("method", ["mean_key", "quest", "h2o", "tova"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_folds_in_what_it_weighed(family, method, monkeypatch):
    model = tiny_model(family, device=DEVICE)
    offload(model, config(method))
    fold, steps = decode.fold_attention, []

    def compare(ex, layer, call, ws, lens, rule):
        before = layer.heat.clone().cpu()
        fold(ex, layer, call, ws, lens, rule)
        x = weights_of(layer, call, ex.cache)
        ids = ws.selected_blocks.long().cpu()
        chosen = torch.zeros(before.shape, dtype=torch.bool)
        for index in (ids >= 0).nonzero().tolist():
            chosen[index[0], index[1], ids[tuple(index)]] = True
        x = x.masked_fill(~chosen[:, :, None, :, None], -torch.inf)
        mass = x.flatten(3).softmax(-1).view(x.shape).sum(4).mean(2)
        assert torch.allclose(mass.sum(-1), torch.ones(()), atol=1e-4)
        new = (
            normalised(ws.block_scores.cpu(), ex.selector.normalise)
            if ex.selector.score_kind != "none"
            else 0 * mass
        )
        new = torch.where(chosen, mass, new)
        if method == "tova":
            new = new.mean(1, keepdim=True).expand_as(new)
            assert torch.equal(ids[:, 0], ids[:, 1]), "one set a layer"
        decay = EVICTING[method].decay if method in EVICTING else 0.98
        torch.testing.assert_close(layer.heat.cpu(), decay * before + new, atol=1e-4, rtol=1e-3)
        steps.append(layer.spec.layer_idx)

    monkeypatch.setattr(decode, "fold_attention", compare)
    hook = drop_before_every_step(model)  # so that both hits and misses are weighed
    greedy(model, prompt(260, rows=2), new=8)
    hook.remove()
    assert len(steps) >= 8 and model.rheo.stats().miss_blocks > 0


@pytest.mark.parametrize(
    "rule", [None, AttentionHeat(0.5), AttentionHeat(0.0, layer_wide=True), AttentionHeat(1.0)]
)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_prompt_starts_as_if_its_last_queries_had_been_steps(rule, soft_cap):
    """Two rows, one padded, history that ends inside a block, in two pieces; the truth is a dense softmax."""
    size, blocks, dim, heads, group, queries = 8, 9, 16, 2, 3, 12
    start, history = torch.tensor([21, -4], dtype=torch.int32), torch.tensor([21, 0], dtype=torch.int32)
    k = torch.randn(2, heads, blocks * size, dim)
    q = torch.randn(2, heads * group, queries, dim)
    own = torch.stack([k[0, :, 21 : 21 + queries], torch.randn(heads, queries, dim)])
    own[1, :, 4:] = k[1, :, : queries - 4]
    call = AttentionCall(q=q, k=own, v=own, softmax_scale=0.3, soft_cap=soft_cap)

    class Layer:
        spec = type("Spec", (), {"num_kv_heads": heads})

    mass = PromptMass(call, Layer, blocks, 6)
    staged = torch.full((2, heads, 2, size, dim), torch.nan)
    for first in (0, 2):
        tokens = (history - first * size).clamp(0, 2 * size)
        piece = staged.clone()
        for b in range(2):
            n = int(tokens[b])
            piece[b].flatten(1, 2)[:, :n] = k[b, :, first * size : first * size + n]
        mass.add_history(piece, first, tokens)
    mass.add_chunk(start, size)

    x = 0.3 * torch.einsum("bhgwd,bhnd->bhgwn", q.unflatten(1, (heads, group)), k)
    x = x if soft_cap is None else soft_cap * torch.tanh(x / soft_cap)
    at = start[:, None] + torch.arange(queries)  # position of every query
    x = x.masked_fill((torch.arange(blocks * size) > at[..., None])[:, None, None], -torch.inf)
    real = (at >= 0)[:, None, None, :, None]
    weights = torch.where(real, x.softmax(-1).nan_to_num(0.0), 0.0)
    by_block = weights.unflatten(4, (blocks, size)).sum(5).mean(2)[:, :, -6:]  # [B, Hkv, W, N]
    if rule is None:
        expected = by_block.sum(2) / 6
    else:
        expected = torch.zeros(2, heads, blocks)
        for w in range(6):
            expected = rule.decay * expected + by_block[:, :, w]
        expected = expected.mean(1, keepdim=True).expand_as(expected) if rule.layer_wide else expected
    lse = torch.logsumexp(x, -1).flatten(1, 2).masked_fill(~real[:, 0, 0, :, 0][:, None], -torch.inf)
    torch.testing.assert_close(mass.heat(lse, rule), expected, atol=1e-5, rtol=1e-4)


def test_prefill_leaves_the_weights_of_its_last_queries():
    """Through the model: one chunk, whole prompt; snapkv's heat is the mean of the last queries and stays it."""
    model = tiny_model("llama", device=DEVICE)
    seen = {}

    def watch(module, args, kwargs, output):
        seen[module.layer_idx] = output[1]

    hooks = [layer.self_attn.register_forward_hook(watch, with_kwargs=True) for layer in model.model.layers]
    ids = prompt(100)
    with torch.no_grad():
        model(ids[:, :99], output_attentions=True)
    for hook in hooks:
        hook.remove()
    offload(model, config("snapkv", prefill={"chunk_tokens": 256}))
    greedy(model, ids, new=6)
    for i, layer in model.rheo._last.executor.cache.full.items():
        weights = seen[i][0, :, -HEAT_QUERIES:].unflatten(0, (layer.spec.num_kv_heads, -1)).mean((1, 2))
        padded = torch.nn.functional.pad(weights, (0, layer.max_blocks * BLOCK - 99))
        expected = padded.unflatten(1, (-1, BLOCK)).sum(-1)
        torch.testing.assert_close(layer.heat[0], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", [*EVICTING, "mean_key"])
def test_full_budget_equals_stock_and_eviction_changes_speed_only(method):
    model = tiny_model("llama", device=DEVICE)
    ids, mask = batch((120, 37, 7))
    expected = greedy(model, ids, attention_mask=mask)
    offload(model, config(method, budget_blocks=16))
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    model.rheo.config = config(method)
    calm = greedy(model, prompt())
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, prompt()), calm)
    assert model.rheo.stats().miss_blocks > 0
    hook.remove()


@pytest.mark.parametrize("method", ["h2o", "tova", "snapkv"])
def test_what_left_the_set_does_not_come_back(method):
    model = tiny_model("llama", device=DEVICE)
    offload(model, config(method))
    history = []

    class Observer:
        def before_step(self, rows): ...

        def begin(self, rows): ...

        def note(self, layer, workspace):
            if layer.spec.layer_idx == 0:
                history.append([set(h) - {-1} for h in workspace.selected_blocks[0].tolist()])

    model.rheo.on_executor = lambda executor: setattr(executor, "observer", Observer())
    greedy(model, prompt(), new=60)
    gone = [set(), set()]
    for before, after in zip(history, history[1:], strict=False):
        for h in range(2):
            assert not gone[h] & after[h]
            gone[h] |= before[h] - after[h]
    assert all(gone) and len(history) >= 59


def test_inactive_rows_keep_their_heat():
    model = tiny_model("llama", device=DEVICE)
    offload(model, config())
    cache = model.rheo.new_cache(max_length=300)
    ids = prompt(120, rows=2)
    greedy(model, ids, new=3, past_key_values=cache)
    executor = cache.executor
    executor.cache.active[1] = 0
    before = [layer.heat.clone() for layer in executor.cache.full.values()]
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    for layer, old in zip(executor.cache.full.values(), before, strict=True):
        assert torch.equal(layer.heat[1], old[1]) and not torch.equal(layer.heat[0], old[0])


def test_all_that_is_not_forced_is_ranked_by_heat():
    selector = make_selector("h2o", {}, block_size=64)
    policy = make_policy(
        selector=selector,
        block_budget=10,
        sink_blocks=1,
        recent_blocks=3,
        query_agnostic_share=0.2,
        heat_decay=0.9,
    )
    assert (policy.query_blocks, policy.agnostic_blocks, policy.recent_blocks) == (0, 6, 3)


@pytest.mark.parametrize("method", ["streaming", "full", "power", "moa"])
def test_methods_without_heat_are_refused(method):
    with pytest.raises(ConfigError, match=f"heat_from: method '{method}' keeps no heat"):
        offload(
            tiny_model("llama"),
            RheoConfig.from_dict({"selection": {"method": method, "heat_from": "attention"}}),
        )


@pytest.mark.parametrize("method", EVICTING)
def test_methods_with_a_rule_of_their_own_are_refused(method):
    with pytest.raises(
        ConfigError, match=f"heat_from: method '{method}' takes its heat from attention by a rule"
    ):
        offload(
            tiny_model("llama"),
            RheoConfig.from_dict({"selection": {"method": method, "heat_from": "attention"}}),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["mean_key", *EVICTING])
def test_gpu_equals_cpu(method):
    """In captured steps too: tokens, and the blocks selected at the end."""
    tokens, blocks = [], []
    for device in ("cuda", "cpu"):
        model = offload(tiny_model("llama", device=device), config(method))
        tokens.append(greedy(model, prompt(rows=2).to(device), new=32).cpu())
        executor = model.rheo._last.executor
        layers = executor.cache.full.values()
        blocks.append(torch.stack([executor.workspace_of(layer).selected_blocks.cpu() for layer in layers]))
    assert torch.equal(*tokens) and torch.equal(*blocks)
