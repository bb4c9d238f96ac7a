"""`hisa` and `token_select`: every step against a softmax over the tokens that plain loops pick."""

import pytest
import torch

from rheo_offload import ConfigError, RheoConfig, offload
from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.execution import decode
from rheo_offload.execution.refine import _best_tokens
from rheo_offload.selection.refined import SCORERS, TokenRule
from rheo_offload.types import AttentionCall, Policy
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.model.test_families import batch, drop_before_every_step
from tests.test_end_to_end import BLOCK, greedy, prompt, sparse_config


def config(method, budget_blocks=6, tokens=40, **params):
    return sparse_config(
        method, budget_blocks, selection={"params": {"tokens": tokens, **params}}, audit={"every": 1}
    )


def plain(layer, call, ws, cache, rule, policy):
    """Return [B, Hq, D] by loops over rows and heads; keys and values come from the host store."""
    heads, group = layer.spec.num_kv_heads, layer.spec.group_size
    q, out = call.q[:, :, 0].double().cpu(), torch.zeros(call.q[:, :, 0].shape).double()
    for b, n in enumerate(cache.step_lens.tolist()):
        blocks = -(-n // BLOCK)
        keys, values, logits, places, free = [], [], [], [], []
        for h in range(heads):
            chosen = [x for x in ws.selected_blocks[b, h].tolist() if x >= 0]
            at = [t for x in chosen for t in range(x * BLOCK, min(n, (x + 1) * BLOCK))]
            pages = cache.host_table[b].long().cpu()
            k, v = (host[pages, h].double().flatten(0, 1)[at] for host in (layer.k_host, layer.v_host))
            x = call.softmax_scale * q[b, h * group : (h + 1) * group] @ k.T
            x = x if call.soft_cap is None else call.soft_cap * torch.tanh(x / call.soft_cap)
            fixed = [
                rule.keeps_forced and not policy.sink_blocks <= t // BLOCK < blocks - policy.recent_blocks
                for t in at
            ]
            keys.append(k), values.append(v), logits.append(x), places.append(at)
            free.append(torch.tensor([i for i, f in enumerate(fixed) if not f], dtype=torch.int64))
        votes = [x[:, f].softmax(-1).sum(0) for x, f in zip(logits, free, strict=True)]
        if rule.layer_wide:
            votes = [sum(votes)] * heads
        for h in range(heads):
            best = votes[h].sort(descending=True, stable=True).indices[: rule.tokens]
            kept = sorted(set(range(len(places[h]))) - set(free[h].tolist()) | set(free[h][best].tolist()))
            for g in range(group):
                out[b, h * group + g] = logits[h][g, kept].softmax(-1) @ values[h][kept]
    return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("method", ["hisa", "token_select"])
def test_every_step_attends_to_the_best_tokens(family, method, monkeypatch):
    model = tiny_model(family, device=DEVICE)
    offload(model, config(method))
    attend, checked = decode.attend_tokens, []

    def compare(ex, layer, call, ws, lens, rule, out):
        attend(ex, layer, call, ws, lens, rule, out)
        expected = plain(layer, call, ws, ex.cache, rule, ex.policy_of(layer))
        torch.testing.assert_close(out.double().cpu(), expected, atol=1e-4, rtol=1e-3)
        checked.append(layer.spec.layer_idx)

    monkeypatch.setattr(decode, "attend_tokens", compare)
    ids, mask = batch((230, 90, 7))
    hook = drop_before_every_step(model)
    greedy(model, ids, new=6, attention_mask=mask)
    hook.remove()
    stats = model.rheo.stats()
    assert len(checked) >= 5 and stats.miss_blocks > 0
    assert 0 < stats.captured_mass_mean < 1, "the audit counts the tokens that were kept"


@pytest.mark.parametrize("method", ["hisa", "token_select"])
def test_enough_tokens_equal_stock(method):
    """Budget and tokens beyond the context: sinks of the model, ragged rows, everything dropped before each step."""
    model = tiny_model("gpt_oss", device=DEVICE)
    ids, mask = batch((120, 37, 7))
    expected = greedy(model, ids, attention_mask=mask)
    offload(model, config(method, budget_blocks=16, tokens=300))
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    hook.remove()


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_hisa_takes_any_block_scorer(scorer):
    """With more tokens than candidates it is that method, token for token."""
    ids, made = prompt(), []
    for method, params in ((scorer, {}), ("hisa", {"scorer": scorer, "tokens": 10_000})):
        model = tiny_model("llama", device=DEVICE)
        offload(model, sparse_config(method, selection={"params": params}))
        made.append(greedy(model, ids, new=8))
    assert torch.equal(*made)


def test_ties_go_to_the_earlier_token_and_junk_never_counts():
    """All keys are equal; slot 0 and what lies beyond the row are NaN."""
    size, heads = 4, 2
    pool = torch.full((8, size, 8), torch.nan)
    pool[1:6] = 1.0
    pool[6, :2] = 1.0  # the tail, 2 tokens of block 5

    class Layer(FullLayer):
        def __init__(self):
            self.k_pool = pool

    q = torch.randn(2, 4, 1, 8)
    call = AttentionCall(q=q, k=q[:, :heads], v=q[:, :heads], softmax_scale=1.0)
    blocks = torch.tensor([[0, 2, 4, 5], [-1, -1, -1, -1]], dtype=torch.int32)[:, None].expand(2, heads, 4)
    slots = torch.tensor([[1, 2, 3, 6], [-1, -1, -1, -1]], dtype=torch.int32)[:, None].expand(2, heads, 4)
    lens = torch.tensor([22, 0], dtype=torch.int32)
    policy = Policy(
        block_budget=4, sink_blocks=1, recent_blocks=1, query_blocks=2, agnostic_blocks=0, heat_decay=1.0
    )
    for forced, first in ((False, [0, 1, 2, 3, 4]), (True, [0, 1, 2, 3, 12, 13, 4, 5, 6, 7, 8])):
        rule = TokenRule(tokens=5, layer_wide=False, keeps_forced=forced)
        index, counts = _best_tokens(call, Layer(), slots, blocks, lens, rule, policy)
        assert counts.tolist() == [len(first), 0] and index.shape[2] % size == 0
        assert index[0, 0, : len(first)].tolist() == first


@pytest.mark.parametrize("method", ["hisa", "token_select"])
def test_what_stands_for_whole_blocks_is_refused(method):
    for key, value in (("remainder", "centroid"), ("heat_from", "attention")):
        with pytest.raises(ConfigError, match=f"selection.{key}.*{method}.*single tokens"):
            offload(tiny_model("llama"), RheoConfig.from_dict({"selection": {"method": method, key: value}}))
    with pytest.raises(ConfigError, match="tokens must be at least 1, not 0"):
        offload(
            tiny_model("llama"),
            RheoConfig.from_dict({"selection": {"method": method, "params": {"tokens": 0}}}),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["hisa", "token_select"])
def test_gpu_equals_cpu(method):
    tokens = []
    for device in ("cuda", "cpu"):
        model = offload(tiny_model("llama", device=device), config(method))
        tokens.append(greedy(model, prompt(rows=2).to(device), new=32).cpu())
    assert torch.equal(*tokens)
