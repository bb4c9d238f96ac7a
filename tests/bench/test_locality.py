"""The replay of locality: against the runtime, against plain top-k, and the rows and tables it writes."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.locality import Grid, Heat, _trace, policy_of, replay_text, walk
from bench.locality_recall import RECALL_TEXTS, recall_ids
from bench.locality_report import FIGURE, TABLE, records
from bench.locality_streams import Ranking, Streams, streams_of
from bench.locality_suite import HIT_RATE, RECALL_KEPT, _ids_of, attach_own_heads, capture_text, rows_of
from rheo_offload import RheoConfig, offload
from rheo_offload.calibration.score import WARM_QUERIES
from rheo_offload.eval.recall import ASK, CLOSE, FILLER0
from rheo_offload.model.learned_heads import HeadsInfo, save_heads
from rheo_offload.model.specs import layer_specs
from rheo_offload.trace.recorder import record
from rheo_offload.trace.replay import replay
from tests.helpers.tiny_model import tiny_model

PROMPT, STEPS, BLOCK = 320, 64, 16
GRID = Grid(
    block_sizes=(16, 32), token_budgets=(128, 192), shares=(0.0, 0.5),
    heats=(Heat("scores", 0.9), Heat("attention", 0.98)), capacities=(1.0, 1.25, 1.5), skip=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def samples():
    """Captured from a tiny model of two layers with two KV heads each, in blocks of 16."""
    model = tiny_model("llama", max_position_embeddings=1024)
    ids = torch.randint(3, 97, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(2))
    return capture_text(model, ids, prompt_tokens=PROMPT, block_size=BLOCK)


@pytest.fixture(scope="module")
def results(samples):
    return list(replay_text(samples, GRID, itemsize=2))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from tests.helpers.spelling_model import save_spelling_model  # needs the [gguf] extra, which skips

    return save_spelling_model(tmp_path_factory.mktemp("spelling"))


def random_streams(steps: int = 60, blocks: int = 40) -> Streams:
    """Made up: three streams of independent scores and mass, one block of 4 tokens closing now and then."""
    rng = torch.Generator().manual_seed(4)
    positions = torch.arange(blocks * 4 - steps - WARM_QUERIES, blocks * 4)
    draw = torch.rand(2, len(positions), 3, blocks, generator=rng) ** 4
    exists = torch.arange(blocks) <= (positions // 4)[:, None, None]
    closed = torch.arange(blocks) < ((positions + 1) // 4)[:, None, None]
    mass = draw[0].masked_fill(~exists, 0.0)
    return Streams(
        positions=positions,
        scores=draw[1].masked_fill(~closed, -torch.inf),
        start_shares=torch.zeros(3, blocks),
        mass=mass / mass.sum(-1, keepdim=True),
        strong=mass > 0.9,
        block_size=4,
        block_bytes=64,
    )


# ---- the replay --------------------------------------------------------------------------------------------


def one_layer(**changes):
    """A model whose queries do not depend on what is attended; as many KV heads as query heads."""
    heads = tiny_model("llama").config.num_attention_heads
    return tiny_model(
        "llama", num_hidden_layers=1, num_key_value_heads=heads, max_position_embeddings=1024, **changes
    )


def run_recorded(model, settings):
    """Return the configuration, what was said and the recorded steps of a run over evictions."""
    common = [
        "cache.block_size=16", "selection.token_budget=128", "cache.capacity_ratio=1.25", "cache.device_memory=floor",
        "cache.host_memory=64MiB",
    ]  # fmt: skip
    config = RheoConfig().with_overrides(common + settings)
    model = offload(model, config, check=False)
    prompt = torch.randint(3, 97, (1, PROMPT + 1), generator=torch.Generator().manual_seed(5))
    with record(model) as recorder:  # the prompt's last token is the first step
        said = model.generate(prompt, max_new_tokens=STEPS, do_sample=False)
    ran = recorder.trace()
    assert ran.steps == STEPS and ran.misses.sum() > 20
    return config, said[0, : PROMPT + STEPS], ran


def assert_equal_runs(streams, policy, heat, ran):
    walked = walk(streams, policy, [heat])
    np.testing.assert_array_equal(walked.ids[0], ran.ids[0, 0])
    trace = _trace(streams, walked, 0, policy, ran.meta["capacity"])
    np.testing.assert_array_equal(replay(trace, "lru").demand, ran.misses)


@pytest.mark.parametrize("source", ["scores", "attention"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_it_selects_and_misses_what_the_runtime_does(source, share):
    settings = [f"selection.heat_from={source}", f"selection.query_agnostic_share={share}"]
    _, ids, ran = run_recorded(one_layer(), settings)
    found = capture_text(one_layer(), ids, prompt_tokens=PROMPT, block_size=BLOCK)
    streams = streams_of(found, block_size=BLOCK, itemsize=4)
    assert_equal_runs(streams, policy_of(8, share), Heat(source, 0.98), ran)
    assert streams.block_bytes == ran.meta["block_bytes"]


@pytest.mark.parametrize("method", ["infllm_v2", "nosa"])
def test_windows_and_learned_bias_select_and_miss_what_the_runtime_does(method, tmp_path):
    stock = one_layer()
    spec = layer_specs(stock.config)[0]
    rng = torch.Generator().manual_seed(6)
    wide = spec.num_kv_heads * spec.head_dim
    head = {
        "delta.weight": torch.randn(spec.num_kv_heads, wide, generator=rng),
        "A": torch.ones(spec.num_kv_heads),
    }
    info = HeadsInfo.of([spec], model_type="llama", method="nosa", provenance="random")
    save_heads(tmp_path / "heads.safetensors", {0: {f"self_attn.{k}": v for k, v in head.items()}}, info)
    settings = [
        f"selection.method={method}", "selection.params.window_stride=4", "selection.query_agnostic_share=0.5",
        *([f"selection.params.weights={tmp_path / 'heads.safetensors'}"] if method == "nosa" else []),
    ]  # fmt: skip
    config, ids, ran = run_recorded(one_layer(), settings)
    if method == "nosa":
        attach_own_heads(stock, config)
    found = capture_text(stock, ids, prompt_tokens=PROMPT, block_size=4)
    streams = streams_of(found, Ranking(method="infllm_v2", stride=4), block_size=BLOCK, itemsize=4)
    heat = Heat("bias") if method == "nosa" else Heat("scores", 0.98)
    assert_equal_runs(streams, policy_of(8, 0.5), heat, ran)


def test_share_0_is_plain_top_k():
    streams = random_streams()
    policy = policy_of(8, 0.0)
    walked = walk(streams, policy, [Heat()])
    for t, position in enumerate(streams.positions[WARM_QUERIES:].tolist()):
        tail = position // 4
        forced = [0, tail - 1, tail]
        for s in range(3):
            scores = streams.scores[WARM_QUERIES + t, s].clone()
            scores[forced] = scores[tail:] = -torch.inf
            chosen = sorted({*forced, *scores.topk(5).indices.tolist()})
            assert walked.ids[0, s, t].tolist() == chosen
            mass, strong = streams.mass[WARM_QUERIES + t, s], streams.strong[WARM_QUERIES + t, s]
            wanted = {n for n in strong.nonzero()[:, 0].tolist() if n <= tail} - {*forced}
            assert walked.pointed[0, s, t].tolist() == [len(wanted & {*chosen}), len(wanted)]
            assert walked.recall[0, s, t] == pytest.approx(float(mass[chosen].sum()), rel=1e-5)


def test_heats_walked_together_are_those_walked_alone():
    streams, policy = random_streams(), policy_of(8, 0.5)
    heats = [Heat(source, decay) for source in ("scores", "attention") for decay in (0.9, 1.0)]
    together = walk(streams, policy, heats)
    for v, heat in enumerate(heats):
        np.testing.assert_array_equal(walk(streams, policy, [heat]).ids[0], together.ids[v])
    assert len({together.ids[v].tobytes() for v in range(len(heats))}) == len(heats)


def test_a_window_in_larger_blocks_is_the_window_captured_in_them(samples):
    model = tiny_model("llama", max_position_embeddings=1024)
    ids = torch.randint(3, 97, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(2))
    wide = capture_text(model, ids, prompt_tokens=PROMPT, block_size=32)
    joined, direct = (streams_of(s, block_size=32, itemsize=4) for s in (samples, wide))
    torch.testing.assert_close(joined.scores, direct.scores)
    torch.testing.assert_close(joined.mass, direct.mass)
    torch.testing.assert_close(joined.mass.sum(-1), torch.ones(joined.mass.shape[:2]))  # nothing is left out


def test_every_setting_is_there_once(results):
    # per block size, budget and pool: share 0, and share 0.5 with two heats
    assert len(results) == 2 * 2 * 3 * 3
    settings = {(r.block_size, r.blocks, r.share, r.heat, r.capacity) for r in results}
    assert len(settings) == len(results)
    assert all((r.heat is None) == (r.share == 0) for r in results)
    for r in results:
        assert 0 < r.recall <= 1 and r.hit_rate_unforced <= r.hit_rate <= 1
        assert r.bytes == r.misses * 2 * r.block_size * 16 * 2


def test_a_larger_pool_never_misses_more(results):
    by_setting: dict[object, list[float]] = {}
    for r in results:
        by_setting.setdefault((r.block_size, r.blocks, r.share, r.heat), []).append(r.misses)
    for misses in by_setting.values():
        assert misses == sorted(misses, reverse=True)
    assert all(misses[0] > misses[-1] for misses in by_setting.values())


def test_the_same_text_gives_the_same_numbers(samples, results):
    assert [asdict(r) for r in replay_text(samples, GRID, itemsize=2)] == [asdict(r) for r in results]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (replace(GRID, token_budgets=(256,)), "largest pool 24 slots"),
        (replace(GRID, skip=STEPS), "leaves nothing of 64"),
        (replace(GRID, block_sizes=(24,)), "not whole blocks of 24"),
    ],
)
def test_a_grid_that_says_nothing_is_refused(samples, grid, message):
    with pytest.raises(ValueError, match=message):
        list(replay_text(samples, grid, itemsize=2))


# ---- recall contexts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECALL_TEXTS)
def test_every_answer_stands_in_the_context(name):
    ids = recall_ids(name, 2048, 128)
    assert ids.shape == (2048 + 128,) and torch.equal(ids, recall_ids(name, 2048, 128))
    context, asked = ids[:2048].tolist(), ids[2048:].tolist()
    assert ASK not in context and asked[0] == ASK
    records = [n for n, token in enumerate(context) if n and token < FILLER0]
    whole = asked[: len(asked) - asked[::-1].index(CLOSE)]  # the last question may be cut off
    pairs = {tuple(context[n : n + 2]) for n in records}
    for a, b in zip(whole, whole[1:], strict=False):
        assert {a, b} & {ASK, CLOSE} or (a, b) in pairs
    regions = len({(n - 8) // 64 for n in records})
    assert regions < 8 if name == "recall-crowded" else regions > 8


def test_recall_contexts_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="256 names"):
        recall_ids("recall-copying", 2048, 512)
    with pytest.raises(ValueError, match="words of the model native"):
        _ids_of("recall-copying", ["a", "b"], 2048, 128)


# ---- rows, tables, command line ------------------------------------------------------------------------------


def test_the_target_needs_hits_and_recall(results):
    first = results[0]
    plain = replace(first, share=0.0, heat=None, recall=0.8, hit_rate=0.9)
    good = replace(first, share=0.5, heat=Heat(), recall=0.8 * RECALL_KEPT + 1e-6, hit_rate=HIT_RATE)
    cases = [plain, good, replace(good, recall=0.79), replace(good, hit_rate=0.979)]
    met = [row.target_met for row in rows_of(cases, fill="text", model="m")]
    assert met == ["false", "true", "false", "false"]


def test_the_command_writes_rows_and_tables(tmp_path, model_dir):
    out = tmp_path / "out"
    assert main(["locality", "--quick", "--device", "cpu", "--model", str(model_dir), "--out", str(out)]) == 0
    rows = records(out)
    # 2 block sizes, 1 budget, 4 pools: share 0, and three shares with six heats
    assert len(rows) == 2 * 1 * 4 * (1 + 3 * 6)
    assert len({r["case_id"] for r in rows}) == len(rows)
    for row in rows:
        for name in ("p50", "hit_rate", "hit_rate_unforced", "captured_mass", "missed_blocks", "bytes_moved"):
            assert row[name] is not None, name
        assert row["commit"] and row["command"].startswith("python -m bench locality")
        assert row["n"] == 2 * (64 - 16) and row["fill"] == "prose-reference"
    table = (out / TABLE).read_text()
    assert "| mean_key, attention, 0.98, 0.5 |" in table and "8 blocks of 64 tokens" in table
    assert {"config.yaml", "env.json"} <= {path.name for path in out.iterdir()}


def test_a_model_with_its_own_ranking_is_replayed_twice(tmp_path):
    """`native`: mean keys with the default split, and its own windows and split, where its bias is one rank more."""
    words = ["--model", "native", "--texts", "recall-copying", "--prompt-tokens", "1024", "--steps", "64"]
    words += ["--skip", "16", "--block-sizes", "32", "--token-budgets", "256", "--device", "cpu"]
    assert main(["locality", *words, "--out", str(tmp_path)]) == 0
    rows = records(tmp_path)
    assert len({r["case_id"] for r in rows}) == len(rows)
    by_method = {m: {r["heat"] for r in rows if r["method"] == m} for m in ("mean_key", "infllm_v2")}
    assert by_method["mean_key"] == {"none", "scores", "attention"}
    assert by_method["infllm_v2"] == {"none", "scores", "attention", "bias"}
    assert all(r["n"] == 8 * 48 and 0 <= r["pointed"] <= 1 for r in rows)
    assert "| bias, 0.2308 |" in (tmp_path / TABLE).read_text()


def test_the_figure_is_drawn_where_matplotlib_is(tmp_path, model_dir):
    pytest.importorskip("matplotlib")
    assert (
        main(["locality", "--quick", "--device", "cpu", "--model", str(model_dir), "--out", str(tmp_path)])
        == 0
    )
    assert (tmp_path / FIGURE).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--texts", "poems"], "unknown texts: poems"),
        (["--skip", "192"], "leaves nothing"),
        (["--token-budgets", "192"], "at least 4 blocks"),
        (["--decays", "1.5"], "between 0 and 1"),
        (["--capacities", "0.5"], "at least 1.0"),
        (["--block-sizes", "32,48"], "multiples of the smallest"),
        (["--prompt-tokens", "8100"], "whole blocks of 64"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_read(words, message, tmp_path, capsys):
    assert main(["locality", "--model", "nowhere", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
