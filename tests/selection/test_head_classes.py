"""duo, moa, power: which blocks each KV head may keep, against plain Python, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch

from rheo_offload import RheoConfig, offload, restore
from rheo_offload.errors import ConfigError
from rheo_offload.ops import kernels_for
from rheo_offload.selection.duo import read_alphas, streaming_heads
from rheo_offload.selection.policy import make_policy, make_selector
from rheo_offload.types import LayerSpec
from tests.helpers.homes import DEVICE, poison
from tests.helpers.tiny_model import tiny_model
from tests.model.test_families import batch
from tests.test_end_to_end import greedy, prompt, sparse_config

C, LAYERS, HEADS, GROUP = 32, 2, 2, 2
SPECS = [
    LayerSpec(layer_idx=i, num_q_heads=HEADS * GROUP, num_kv_heads=HEADS, head_dim=16) for i in range(LAYERS)
]
HOMES = {"reference": "cpu", "numba": "cpu", "triton": DEVICE}
LENS = [13 * C + 5, 10 * C, 24 * C - 1, C, 9, 0]
ALPHAS = np.array([[0.9, 0.1], [0.3, 0.7]])
PLAN = {  # windows of 3 and 4.5 blocks; half the row and the whole row; none (negative); everything
    "alphas": [[96.0, -500.0, 0.0, 144.0], [0.0, 0.0, -9e9, 1e9]],
    "betas": [[0.0, 0.0, 0.5, 0.0], [0.5, 1.0, 0.0, 0.0]],
}


@pytest.fixture
def alphas(tmp_path):
    np.savetxt(tmp_path / "full_attention_heads.tsv", ALPHAS, delimiter="\t")
    return str(tmp_path)


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    return str(tmp_path / "plan.json")


def selected_by(selector, layer, home, *, budget, sink=1, recent=2, lens=LENS):
    """Which blocks a method without scorer selects in a layer: lists [row][head]."""
    device = HOMES[home]
    ops = kernels_for(torch.device(device), home)
    policy = make_policy(
        selector=selector, block_budget=budget, sink_blocks=sink, recent_blocks=recent,
        query_agnostic_share=0.5, heat_decay=0.98,
    )  # fmt: skip
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    method = selector.for_layer(layer) if hasattr(selector, "for_layer") else selector
    scores = poison(len(lens), HEADS, 26, dtype=torch.float32, device=device)
    table = torch.zeros(len(lens), 26, dtype=torch.int32, device=device)
    method.score(
        ops, torch.zeros(len(lens), 4, 16, device=device), None, table, seq_lens, None, None, scores,
        softmax_scale=1.0, block_size=C,
    )  # fmt: skip
    ids = poison(len(lens), HEADS, budget, dtype=torch.int32, device=device)
    count = poison(len(lens), HEADS, dtype=torch.int32, device=device)
    ops.select(
        scores, None, seq_lens, ids, count, block_size=C, sink_blocks=sink, recent_blocks=recent,
        query_blocks=policy.query_blocks, agnostic_blocks=policy.agnostic_blocks, heat_decay=1.0,
        normalise="none", rule=policy.rule, limit=policy.limit,
    )  # fmt: skip
    return [[[n for n in head if n >= 0] for head in row] for row in ids.tolist()]


def forced_and(wanted, seq_len, budget, sink=1, recent=2):
    """Sink, recent, and of the wanted blocks the nearest that fit the budget."""
    blocks = -(-seq_len // C)
    forced = {n for n in range(blocks) if n < sink or n >= blocks - recent}
    rest = sorted((n for n in range(blocks) if wanted(n) and n not in forced), reverse=True)
    return sorted(forced | set(rest[: budget - sink - recent]))


@pytest.mark.parametrize("budget", [5, 12])
@pytest.mark.parametrize("home", HOMES)
def test_power_keeps_powers_of_two(home, budget):
    got = selected_by(make_selector("power", {}, block_size=C), 0, home, budget=budget)
    for seq_len, row in zip(LENS, got, strict=True):
        tail = (seq_len - 1) // C
        want = forced_and(lambda n, t=tail: t - n in (1, 2, 4, 8, 16), seq_len, budget)
        assert row == [want, want]


@pytest.mark.parametrize("budget", [6, 26])
@pytest.mark.parametrize("home", HOMES)
def test_moa_windows(home, budget, plan):
    """The longest window of the query heads that share a KV head; alpha may be negative."""
    selector = make_selector("moa", {"plan": plan}, block_size=C).by_layer(SPECS, torch.device(HOMES[home]))
    for layer in range(LAYERS):
        got = selected_by(selector, layer, home, budget=budget)
        for seq_len, row in zip(LENS, got, strict=True):
            for h in range(HEADS):
                spans = [
                    PLAN["alphas"][layer][q] + PLAN["betas"][layer][q] * seq_len
                    for q in range(h * GROUP, (h + 1) * GROUP)
                ]
                first = seq_len - max(spans)
                assert row[h] == forced_and(lambda n, f=first: (n + 1) * C > f, seq_len, budget)


@pytest.mark.parametrize("home", HOMES)
def test_duo_classes(home, alphas):
    """With `full`, heads that retrieve take everything and the others sink and recent; the quantile divides them."""
    selector = make_selector("duo", {"heads": alphas, "retrieval": "full"}, block_size=C)
    selector = selector.by_layer(SPECS, torch.device(HOMES[home]))
    retrieves = [[True, False], [False, True]]
    for layer in range(LAYERS):
        got = selected_by(selector, layer, home, budget=26)
        for seq_len, row in zip(LENS, got, strict=True):
            for h in range(HEADS):
                assert row[h] == forced_and(lambda n, k=retrieves[layer][h]: k, seq_len, 26)


def test_the_quantile_is_the_published_one():
    """Heads at or above numpy's quantile retrieve; equal alphas stream in order, and 0 and 1 mean none and all."""
    alphas = np.random.default_rng(0).permutation(64).reshape(8, 8) / 64
    for sparsity in (0.0, 0.1, 0.25, 0.5, 0.77, 0.99):
        want = alphas < np.quantile(alphas, sparsity)
        assert np.array_equal(streaming_heads(alphas, sparsity), want), sparsity
    assert streaming_heads(alphas, 1.0).all()
    same = np.zeros((2, 4))
    assert streaming_heads(same, 0.5).ravel().tolist() == [True] * 4 + [False] * 4


def test_alphas_of_one_layer_and_out_of_range(tmp_path):
    (tmp_path / "a.tsv").write_text("1.2\t-0.5\t0.25\n")
    assert read_alphas(str(tmp_path / "a.tsv")).tolist() == [[1.0, 0.0, 0.25]]


@pytest.mark.parametrize("retrieval", ["mean_key", "quest", "arkvale", "infllm_v2"])
def test_duo_scores_only_heads_that_retrieve(retrieval, alphas):
    """A decode: streaming heads keep sink and recent blocks, the others fill the budget; blocks were evicted."""
    model, ids = tiny_model("llama", device=DEVICE), prompt(300)
    params = {"heads": alphas, "retrieval": retrieval}
    offload(model, sparse_config("duo", 8, selection={"params": params}))
    cache = model.rheo.new_cache(max_length=330)
    greedy(model, ids, past_key_values=cache)
    ex = cache.executor
    found = [ex.cache.full[i].counters[0, :, 0].float() / ex.row_steps + 1 for i in range(2)]
    assert found[0][1] == found[1][0] == 3, "sink and recent blocks"
    assert found[0][0] == found[1][1] == 8, "the budget"
    stats = model.rheo.stats()
    assert stats.selected_blocks_mean == pytest.approx(5.5)
    assert stats.evicted_blocks > 0 and stats.miss_blocks > 0


def config_of(method, alphas, plan, budget_blocks, **params):
    files = {"duo": {"heads": alphas}, "moa": {"plan": plan}, "power": {}}[method]
    return sparse_config(method, budget_blocks, selection={"params": files | params})


@pytest.mark.parametrize("params", [{"sparsity": 0.0}, {"sparsity": 0.0, "retrieval": "full"}])
def test_duo_without_streaming_heads_equals_stock(params, alphas, plan):
    model, ids = tiny_model("llama", device=DEVICE), prompt(150)
    expected = greedy(model, ids)
    offload(model, config_of("duo", alphas, plan, 11, **params))
    assert torch.equal(greedy(model, ids), expected)


def test_moa_with_whole_windows_equals_stock(tmp_path):
    model, (ids, mask) = tiny_model("llama", device=DEVICE), batch((150, 61, 7))
    expected = greedy(model, ids, attention_mask=mask)
    whole = {"alphas": [[0.0] * 2] * 2, "betas": [[1.0] * 2] * 2}  # for the KV heads
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    offload(model, config_of("moa", "", str(tmp_path / "whole.json"), 11))
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)


def test_power_where_everything_is_recent_equals_stock():
    model, ids = tiny_model("llama", device=DEVICE), prompt(60)
    expected = greedy(model, ids)
    offload(model, sparse_config("power", 8, selection={"recent_blocks": 6}))
    assert torch.equal(greedy(model, ids), expected)


@pytest.mark.parametrize("method", ["duo", "moa", "power"])
def test_patterns_depend_on_the_row_alone(method, alphas, plan):
    """A ragged batch equals each row alone, and eviction changes speed only."""
    model, (ids, mask) = tiny_model("llama", device=DEVICE), batch((260, 90, 7))
    config = config_of(method, alphas, plan, 8).with_overrides(["cache.capacity_ratio=1.0"])
    offload(model, config)
    together = greedy(model, ids, attention_mask=mask)[:, ids.shape[1] :]
    stats = model.rheo.stats()
    assert 0 < stats.captured_mass_min <= stats.captured_mass_mean < 1
    assert stats.evicted_blocks > 0 or method == "moa", (
        "a window loses its oldest block to the open one, unseen"
    )
    for row, n in enumerate((260, 90, 7)):
        assert torch.equal(greedy(model, ids[row : row + 1, -n:])[0, n:], together[row]), f"row {row}"


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["duo", "moa", "power"])
def test_captured_steps_are_the_eager_ones(method, alphas, plan):
    model, ids = tiny_model("llama", device=DEVICE), prompt(300)
    offload(model, config_of(method, alphas, plan, 8))
    captured = greedy(model, ids, new=40)
    restore(model)
    config = config_of(method, alphas, plan, 8).with_overrides(["execution.graph=off"])
    offload(model, config)
    assert torch.equal(greedy(model, ids, new=40), captured)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_full_retrieval_needs_the_whole_context(alphas):
    model = tiny_model("llama", device=DEVICE)
    offload(model, sparse_config("duo", 8, selection={"params": {"heads": alphas, "retrieval": "full"}}))
    with pytest.raises(ConfigError, match=r"holds 8 of the 21 blocks of a row: raise it to 336"):
        greedy(model, prompt(300))
    assert greedy(model, prompt(90)).shape == (1, 114)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("duo", {"sparsity": 1.5}, "selection.params.sparsity must be between 0 and 1, not 1.5"),
        ("duo", {"retrieval": "streaming"}, "selection.params.retrieval must be one of mean_key"),
        ("duo", {"retrieval_params": {"x": 1}}, "'mean_key' does not take {'x': 1}"),
        ("duo", {"head": "x"}, "did you mean 'selection.params.heads'?"),
        ("moa", {"plan": 3}, "selection.params.plan must be text, not 3"),
        ("power", {"blocks": 3}, "method 'power' takes none"),
    ],
)
def test_bad_parameters(method, params, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_selector(method, params, block_size=C)


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("duo", None, "selection.params.heads: cannot read"),
        ("duo", "0.1\tx\n", "is no table of numbers"),
        ("duo", "0.1\tnan\n0.1\t0.2\n", "must be a table of finite numbers"),
        ("duo", "0.1\t0.2\n", "has alphas of 1 layers x 2 KV heads, this model has 2 x [2]"),
        ("moa", None, "selection.params.plan: cannot read"),
        ("moa", "{", "holds no alphas and betas"),
        ("moa", '{"alphas": [[1]]}', "holds no alphas and betas"),
        ("moa", '{"alphas": [[1, 2, 3]], "betas": [[1, 2, 3]]}', "for 2 layers of 2 or 4 heads"),
        ("moa", '{"alphas": [[1, 2], [1, 2]], "betas": [[1, 2], [1, NaN]]}', "takes finite numbers"),
    ],
)
def test_files_of_another_model_are_refused_before_it_is_touched(method, text, message, tmp_path):
    file = tmp_path / "file"
    if text is not None:
        file.write_text(text)
    params = {{"duo": "heads", "moa": "plan"}[method]: str(file)}
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=re.escape(message)):
        offload(model, RheoConfig.from_dict({"selection": {"method": method, "params": params}}))
    assert not hasattr(model, "rheo")


@pytest.mark.parametrize("method", ["duo", "moa"])
def test_a_file_must_be_named(method):
    with pytest.raises(ConfigError, match=r"selection\.params\.(heads|plan) must be"):
        offload(tiny_model("llama"), RheoConfig.from_dict({"selection": {"method": method}}))
