"""NOSA and DMA: which blocks the learned bias keeps, what it does to the logits, and that it travels with its block."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from rheo_offload import RheoConfig, offload, restore
from rheo_offload.errors import HeadsError
from rheo_offload.model.learned_heads import BiasHead, HeadsInfo, save_heads
from rheo_offload.selection.policy import make_policy, make_selector
from rheo_offload.types import AttentionCall
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerance import assert_close
from tests.model.test_families import batch, drop_before_every_step
from tests.test_end_to_end import greedy, prompt, sparse_config

HKV, D, STRIDE = 2, 16, 16
INF = float("inf")


def heads_of(layers=2, seed=5):
    """Heads whose bias spreads by a few units, so that it decides which tokens count."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        i: BiasHead(0.3 * normal(HKV, HKV * D), 2 + normal(HKV).abs(), normal(HKV)) for i in range(layers)
    }


@pytest.fixture
def weights(tmp_path):
    """A side file for the tiny llama."""
    info = HeadsInfo(
        model_type="llama", num_layers=2, num_q_heads=4, num_kv_heads=HKV, head_dim=D, method="nosa",
        provenance="random",
    )  # fmt: skip
    path = tmp_path / "heads.safetensors"
    save_heads(path, {i: h.tensors() for i, h in heads_of().items()}, info)
    return str(path)


def config_of(method, weights, *, block_size=32, budget_blocks=7, share=0.6, params=None, **groups):
    return sparse_config(
        method,
        cache={"block_size": block_size},
        selection={
            "token_budget": budget_blocks * block_size,
            "recent_blocks": 2,
            "query_agnostic_share": share,
            "params": {"weights": weights} | (params or {}),
        },
        **groups,
    )


# ---- the published rules, one block at a time ----------------------------------------------------------------------


def windows_of(values):
    """Means of the complete windows of 32 tokens every 16 of values [T, ...], by the number of the window."""
    return [values[j * STRIDE : j * STRIDE + 32].mean(0) for j in range((len(values) - 32) // STRIDE + 1)]


def best_window(scores, block, block_size):
    """The largest score among the windows that touch a block: 4b - 1 .. 4b + 3 for blocks of 64."""
    per_block = block_size // STRIDE
    touching = range(per_block * block - 1, per_block * block + per_block)
    return max((float(scores[j]) for j in touching if 0 <= j < len(scores)), default=-INF)


def query_scores(q, keys, scale, block_size):
    """InfLLM-V2's stage 1: q [G, D], keys [T, D]."""
    windows = windows_of(keys)
    if not windows:
        return [-INF] * -(-len(keys) // block_size)
    weights = torch.softmax(scale * q @ torch.stack(windows).T, -1).sum(0)
    return [best_window(weights, n, block_size) for n in range(-(-len(keys) // block_size))]


def bias_scores(method, bias, block_size):
    """The query-independent rank of every block of a bias [T]."""
    blocks = range(-(-len(bias) // block_size))
    if method == "nosa":
        windows = windows_of(bias)
        return [best_window(windows, n, block_size) for n in blocks]
    whole = len(bias) // block_size
    ranks = []
    for n in blocks:
        tokens = sorted(bias[n * block_size : (n + 1) * block_size].tolist(), reverse=True)
        # the largest t that more than half of the tokens reach
        ranks.append(tokens[block_size // 2] if n < whole else -INF)
    return ranks


def top(scores, count, forced):
    """Ids of the `count` largest scores, those of `forced` first; ties go to the lower id."""
    ranked = sorted(range(len(scores)), key=lambda n: (n not in forced, -scores[n], n))
    return set(ranked[:count])


def published_blocks(method, q, keys, bias, scale, block_size, policy):
    """Two nested top-k with the forced blocks at +inf (NOSA), or one by the bias alone (DMA); for one KV head."""
    blocks = -(-len(keys) // block_size)
    if blocks <= policy.block_budget:
        return set(range(blocks))
    forced = {n for n in range(blocks) if n < policy.sink_blocks or n >= blocks - policy.recent_blocks}
    if method == "nosa":
        scores = query_scores(q, keys, scale, block_size)
        forced = top(scores, len(forced) + policy.query_blocks, forced)
    return top(bias_scores(method, bias, block_size), policy.block_budget, forced)


# ---- selection -----------------------------------------------------------------------------------------------------


def test_the_packaged_sizes_are_the_published_ones():
    """64 blocks: the first, the last 17 (16 and one more), 15 of the query, 31 of the bias."""
    config = RheoConfig.from_yaml("nosa")
    selection, size = config.selection, config.cache.block_size
    policy = make_policy(
        selector=make_selector("nosa", selection.params, block_size=size),
        block_budget=selection.token_budget // size,
        sink_blocks=selection.sink_blocks,
        recent_blocks=selection.recent_blocks,
        query_agnostic_share=selection.query_agnostic_share,
        heat_decay=selection.heat_decay,
    )
    assert (size, policy.block_budget) == (64, 64)
    assert (policy.sink_blocks, policy.recent_blocks) == (1, 17)
    assert (policy.query_blocks, policy.agnostic_blocks) == (15, 31)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("method", ["nosa", "dma"])
def test_pooling_equals_the_plain_rule(method, block_size):
    """Rows that end inside a part, with one part, with none; whatever stands behind the end is never looked at."""
    selector = make_selector(method, {}, block_size=block_size)
    parts = selector.bias_units(block_size)
    lens = [5 * block_size + 7, 4 * block_size, 3 * block_size + 17, 31, 0]
    tokens = torch.randn(len(lens), HKV, 6 * block_size, generator=torch.Generator().manual_seed(0))
    units = tokens.unflatten(2, (6, parts, -1)).mean(-1)
    size = block_size // parts
    for b, n in enumerate(lens):
        units[b].flatten(1)[:, n // size :] = torch.nan
    ends = torch.tensor(lens)[:, None] // size
    pooled = selector.pool(units, torch.zeros_like(ends), ends)
    for b, n in enumerate(lens):
        for h in range(HKV):
            plain = bias_scores(method, tokens[b, h, :n].double(), block_size)
            torch.testing.assert_close(
                pooled[b, h, : len(plain)].double(), torch.tensor(plain, dtype=torch.float64)
            )
            assert (pooled[b, h, len(plain) :] == -INF).all()


def drive(ex, heads, selector, lengths, steps, ties, block_size):
    """Prefill rows in chunks, then decode; yields (layer, row, q, keys, bias) of every row after every step."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        numbers = torch.randint(-2, 3, shape, generator=generator).float()
        return numbers if ties else torch.randn(*shape, generator=generator)

    def forward(layer, q, k, v):
        call = AttentionCall(*(x.to(DEVICE) for x in (q, k, v)), 0.25)
        call.bias = heads[layer](v).to(DEVICE)
        call.bias_scale = selector.logit_factor(0.25)
        return ex.forward(layer, call)

    rows = [[draw(2, HKV, n, D) for n in lengths] for _ in heads]  # (keys, values) by layer and row
    for kept in rows if ties else ():
        for kv in kept:
            for n in (5, 8):  # equal values in three blocks: their bias ties
                if kv.shape[2] >= (n + 2) * block_size:
                    kv[:, :, n * block_size - 32 : (n + 1) * block_size + 32] = 0
    for b, length in enumerate(lengths):
        for first, end in ((0, 3 * block_size + 5), (3 * block_size + 5, length)):
            ex.begin_prefill(slice(b, b + 1), [first], end - first)
            for layer, kept in enumerate(rows):
                k, v = kept[b][:, None, :, first:end]
                forward(layer, draw(1, 4, end - first, D), k, v)
    for _ in range(steps):
        ex.begin_decode()
        for layer, kept in enumerate(rows):
            q, new = draw(len(lengths), 4, 1, D), draw(2, len(lengths), HKV, 1, D)
            forward(layer, q, *new)
            kept[:] = [torch.cat((kv, new[:, b]), 2) for b, kv in enumerate(kept)]
            for b, kv in enumerate(kept):
                yield layer, b, q[b, :, 0], kv[0], heads[layer](kv[1][None])[0]


@pytest.mark.parametrize(
    ("method", "block_size", "share", "ties", "kernels", "steps"),
    [
        ("nosa", 64, 0.6, False, "auto", 8),
        ("nosa", 16, 0.5, False, "auto", 20),
        ("nosa", 32, 1.0, True, "auto", 8),
        ("dma", 32, 0.0, False, "auto", 8),
        ("dma", 16, 0.5, True, "auto", 20),
        ("nosa", 16, 0.5, True, "reference", 12),
        ("nosa", 16, 0.5, False, "triton", 5),
        ("dma", 16, 0.0, False, "triton", 4),
    ],
)
def test_a_step_keeps_the_published_blocks(weights, method, block_size, share, ties, kernels, steps):
    """Ragged rows, one of which fits the budget, over block borders: the blocks of the rule, for every KV head."""
    config = config_of(method, weights, block_size=block_size, share=share, execution={"kernels": kernels})
    model = offload(tiny_model("llama", device=DEVICE), config)
    selector = model.rheo._selector
    lengths = [13 * block_size - 3, 4 * block_size + 7]
    ex = model.rheo._make_executor(2, lengths[0] + steps, torch.float32, torch.device(DEVICE))
    seen = 0
    for layer, b, q, keys, bias in drive(ex, heads_of(), selector, lengths, steps, ties, block_size):
        selected = ex.workspace_of(ex.cache.full[layer]).selected_blocks[b]
        for h in range(HKV):
            group = q[2 * h : 2 * h + 2].double()
            rule = published_blocks(
                method, group, keys[h].double(), bias[h].double(), 0.25, block_size, ex.policy
            )
            assert sorted(rule) == [n for n in selected[h].tolist() if n >= 0], (layer, b, h)
            seen += 1
    assert seen == 2 * 2 * HKV * steps
    ex.cache.check_integrity()


@torch.no_grad()
def test_a_crop_takes_back_what_the_dropped_tokens_said(weights):
    """After a crop and other tokens, the ranks are those of a row that never had the dropped ones."""
    ranks = []
    for detour in (False, True):
        model = offload(tiny_model("llama", device=DEVICE), config_of("nosa", weights, block_size=16))
        cache, ids = model.rheo.new_cache(max_length=300), prompt(180)
        model.rheo.prefill(cache, ids[:, :155])
        if detour:
            for token in prompt(20, seed=9)[0]:
                model(token.view(1, 1), past_key_values=cache)
            cache.crop(-20)
        for token in ids[0, 155:]:
            model(token.view(1, 1), past_key_values=cache)
        ranks.append([layer.heat[..., :11].clone() for layer in cache.executor.cache.full.values()])
    for plain, after in zip(*ranks, strict=True):
        torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_row_that_becomes_another_has_its_ranks_and_growing_keeps_them(weights):
    """Two parts of the open block are known when row 1 becomes row 0 and the tables grow; later the block is ranked."""
    model = offload(tiny_model("llama", device=DEVICE), config_of("nosa", weights, block_size=64))
    cache, ids = model.rheo.new_cache(max_length=270), prompt(245, rows=2)
    model.rheo.prefill(cache, ids)
    cache.reorder_rows([0, 0])
    cache.executor.make_room(1000)
    for token in prompt(13, seed=4)[0]:
        model(token.expand(2, 1), past_key_values=cache)
    for i, layer in cache.executor.cache.full.items():
        assert layer.heat.shape[2] == 16 and torch.equal(layer.heat[0], layer.heat[1])
        pages = cache.executor.cache.host_table[0, :4].long()
        bias = layer.bias_host[pages.cpu()].transpose(0, 1).flatten(1)  # [Hkv, 256]
        for h in range(HKV):
            expected = bias_scores("nosa", bias[h].double(), 64)[3]
            assert float(layer.heat[1, h, 3]) == pytest.approx(expected, rel=1e-4), (i, h)


# ---- attention -----------------------------------------------------------------------------------------------------


def stock_with_bias(model, heads, convention):
    """Make the model's own eager attention add the bias of every key, from the values it is handed."""

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        bias = heads[module.layer_idx](value).repeat_interleave(query.shape[1] // key.shape[1], 1)[:, :, None]
        keys, values = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        logits = query @ keys.transpose(2, 3)
        logits = (logits + bias) * scaling if convention == "scaled" else logits * scaling + bias
        weights = torch.softmax((logits + attention_mask).to(values.dtype), -1)
        return (weights @ values).transpose(1, 2).contiguous(), None

    AttentionInterface.register("stock_with_bias", attention)
    AttentionMaskInterface.register("stock_with_bias", eager_mask)
    model.set_attn_implementation("stock_with_bias")


@pytest.mark.parametrize("convention", ["logit", "scaled"])
@pytest.mark.parametrize("method", ["nosa", "dma"])
def test_full_budget_equals_the_stock_model_with_the_bias(weights, method, convention):
    """A ragged batch, everything resident, and with every block dropped before each step; the bias changes tokens."""
    ids, mask = batch()
    plain = tiny_model("llama", device=DEVICE)
    without = greedy(plain, ids, attention_mask=mask)
    heads = {i: h.to(torch.device(DEVICE), torch.float32) for i, h in heads_of().items()}
    stock_with_bias(plain, heads, convention)
    expected = greedy(plain, ids, attention_mask=mask)
    assert not torch.equal(expected, without)

    params = {"bias_scale": convention}
    model = tiny_model("llama", device=DEVICE)
    offload(model, config_of(method, weights, block_size=16, budget_blocks=16, params=params))
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected), "the bias came back with its block"
    hook.remove()
    stats = model.rheo.stats()
    assert stats.miss_blocks > 0 and stats.captured_mass_mean == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():  # without a cache too
        got, same = (m(ids[:1], use_cache=False).logits for m in (model, plain))
        stock_with_bias(
            plain.double(),
            {i: h.to(torch.device(DEVICE), torch.float64) for i, h in heads.items()},
            convention,
        )
        assert_close(got, plain(ids[:1], use_cache=False).logits, same, torch.float32)
    restore(model)
    assert torch.equal(greedy(model, ids, attention_mask=mask), without), "after restore"


@pytest.mark.parametrize("method", ["nosa", "dma"])
def test_bias_off_is_the_model_as_it_is(weights, method):
    model, ids = tiny_model("llama", device=DEVICE), prompt(150)
    expected = greedy(model, ids)
    offload(model, config_of(method, weights, block_size=16, budget_blocks=12, params={"bias": False}))
    assert torch.equal(greedy(model, ids), expected)


@pytest.mark.parametrize("dense", [[], [1]], ids=["sparse", "one layer dense"])
@pytest.mark.parametrize("method", ["nosa", "dma"])
def test_eviction_changes_speed_only(weights, method, dense):
    """Far more context than budget: tokens do not depend on what happened to be resident, in dense layers too."""
    model, ids = tiny_model("llama", device=DEVICE), prompt(300)
    config = config_of(method, weights, block_size=16, budget_blocks=6)
    offload(model, config.with_overrides([f"selection.dense_layers={dense}"]))
    calm = greedy(model, ids)
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, ids), calm)
    hook.remove()
    stats = model.rheo.stats()
    block_bytes = (2 * 16 * D + 16) * 4
    assert stats.miss_blocks > 0 and stats.h2d_bytes == stats.miss_blocks * block_bytes
    assert stats.d2h_bytes == 2 * HKV * (300 + 23) * block_bytes // 16, "one write-through of every token"
    assert (stats.streamed_h2d_bytes > 0) == bool(dense)
    assert 0 < stats.captured_mass_mean < 1


def test_heads_that_do_not_fit_are_refused_and_nothing_is_changed(weights):
    for family, overrides, reason in (
        ("qwen3", {}, "model_type llama"),
        ("llama", {"head_dim": 8}, "head_dim 16, the model has 8"),
        ("llama", {"num_hidden_layers": 3}, "num_layers 2, the model has 3"),
        ("llama", {"num_key_value_heads": 4}, "num_kv_heads 2, the model has 4"),
    ):
        model = tiny_model(family, **overrides)
        before = model.config._attn_implementation
        tokens = greedy(model, prompt(40), new=8)
        with pytest.raises(HeadsError, match=reason):
            offload(model, config_of("nosa", weights))
        assert not hasattr(model, "rheo") and model.config._attn_implementation == before
        assert torch.equal(greedy(model, prompt(40), new=8), tokens)
    with pytest.raises(HeadsError, match=r"selection\.params\.weights names no file"):
        offload(tiny_model("llama"), config_of("dma", None))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["nosa", "dma"])
def test_gpu_equals_cpu(weights, method):
    """The captured step on a GPU gives the greedy tokens of the CPU, fp32, far beyond the budget."""
    tokens = []
    for device in ("cuda", "cpu"):
        model = tiny_model("llama", device=device)
        offload(model, config_of(method, weights, block_size=16, budget_blocks=6))
        tokens.append(greedy(model, prompt(300, rows=2).to(device), new=32).cpu())
    assert torch.equal(*tokens)
