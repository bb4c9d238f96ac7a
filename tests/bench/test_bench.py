"""The benchmarks measure what they say: gate, rows, floors, baselines, figures."""

import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import gather as gather_suite
from bench import plots
from bench.__main__ import main
from bench.baselines import Decoder, NoAttention, Reference
from bench.decode import Sweep, run_decode
from bench.schema import COLUMNS, Environment, Row, read_rows, write_rows
from bench.shapes import load_config, quick_config, random_model, step_cost, tiny_config, view, weight_bytes
from bench.timing import Quantiles, Rates, RegionProfiler, time_calls
from rheo_offload.config import RheoConfig, resolve_auto
from rheo_offload.execution import executor

CPU = torch.device("cpu")
ENVIRONMENT = Environment(**{name: name for name in Environment.__dataclass_fields__})
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-8b": 8_190_735_360,
}


@pytest.fixture
def sweep() -> Sweep:
    """One small case with stock as the only baseline."""
    overrides = ["cache.block_size=16", "selection.token_budget=64", "selection.recent_blocks=1"]
    return Sweep(
        model=random_model(quick_config(), CPU, torch.float32),
        model_name="quick",
        config=RheoConfig().with_overrides([*overrides, "cache.capacity_ratio=1.25"]),
        rates=Rates(memory=1e9, link=1e8),
        fill="prefill",
        warmup=1,
        steps=2,
        miss_rates=[0.0],
        baselines=["stock"],
    )


def rows_of(sweep: Sweep, context: int = 160) -> list[Row]:
    rows: list[Row] = []
    run_decode(sweep, [2], [context], rows.append)
    return rows


# ---- schema, clocks ----------------------------------------------------------------------------------------


def test_rows_survive_the_file(tmp_path):
    row = Row(
        suite="decode", case_id="a", metric="step", unit="ms", p50=1.25, n=3, batch=4, error="two\nlines"
    )
    write_rows(tmp_path / "rows.csv", [row], ENVIRONMENT)
    (read,) = read_rows(tmp_path / "rows.csv")
    assert list(read) == COLUMNS
    assert (read["p50"], read["n"], read["batch"], read["p20"]) == (1.25, 3.0, 4.0, None)
    assert (read["status"], read["error"], read["device"]) == ("ok", "two lines", "device")


def test_rows_of_another_schema_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("suite,speed\ndecode,9\n")
    with pytest.raises(ValueError, match="speed"):
        read_rows(tmp_path / "rows.csv")


def test_quantiles_swap_when_a_time_becomes_a_rate():
    times = Quantiles.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (times.p50, times.n) == (3.0, 5)
    rate = times.map(lambda ms: 12 / ms)
    assert rate.p20 < rate.p50 == 4.0 < rate.p80 == 12 / times.p20


def test_what_runs_before_a_call_is_not_timed():
    assert max(time_calls(lambda: None, 3, CPU, before=lambda: time.sleep(0.05))) < 40
    assert min(time_calls(lambda: time.sleep(0.05), 3, CPU)) > 40


def test_profiler_adds_up_regions_and_forgets_them():
    profiler = RegionProfiler(CPU)
    for _ in range(2):
        with profiler.region("attend"):
            time.sleep(0.02)
    assert profiler.totals_ms()["attend"] >= 39
    assert profiler.totals_ms() == {}


# ---- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_shapes_have_the_published_number_of_parameters(name):
    model = random_model(load_config(f"configs/models/{name}.json"), torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    embedding = 0 if model.config.tie_word_embeddings else model.config.vocab_size * model.config.hidden_size
    assert weight_bytes(model) == 2 * (PARAMETERS[name] - embedding)


def test_floor_of_a_step_counts_what_is_read():
    model = random_model(
        load_config("configs/models/llama-3.1-8b.json"), torch.device("meta"), torch.bfloat16
    )
    token_bytes = 32 * 8 * 128 * 2 * 2
    dense = step_cost(model, None, rows=4, context_len_tokens=16384)
    assert (dense.kv_bytes, dense.summary_bytes) == (4 * 16384 * token_bytes, 0)
    config = RheoConfig().with_overrides(["selection.token_budget=4096", "selection.dense_layers=[0]"])
    config = resolve_auto(config, context_len_tokens=16384, device_type="cuda")
    sparse = step_cost(model, config, rows=4, context_len_tokens=16384)
    assert sparse.kv_bytes == 4 * (31 * 4096 + 16384) * token_bytes // 32
    assert sparse.summary_bytes == 4 * 31 * (16384 // 32) * 8 * 128 * 2
    assert sparse.floor_bytes == dense.weight_bytes + sparse.kv_bytes + sparse.summary_bytes


def test_the_gates_model_keeps_what_kernels_see():
    config = load_config("configs/models/qwen2.5-0.5b.json")
    tiny = tiny_config(config)
    assert tiny.num_attention_heads // tiny.num_key_value_heads == 7
    assert tiny.hidden_size // tiny.num_attention_heads == 64
    assert config.num_hidden_layers == 24, "the original must stay as it is"
    random_model(tiny, CPU, torch.float32)(input_ids=torch.tensor([[1, 2]]))


def test_views_share_weights_but_not_attention():
    model = random_model(quick_config(), CPU, torch.float32)
    before = model.config._attn_implementation
    other = view(model, "eager")
    assert other.lm_head.weight is model.lm_head.weight
    assert (other.config._attn_implementation, model.config._attn_implementation) == ("eager", before)


# ---- subjects ----------------------------------------------------------------------------------------------


def test_stock_subjects_decode_what_one_forward_says():
    model = random_model(quick_config(), CPU, torch.float32)
    ids = torch.randint(512, (2, 20))
    with torch.inference_mode():
        wanted = ids
        for _ in range(3):
            wanted = torch.cat([wanted, view(model, "eager")(wanted).logits[:, -1:].argmax(-1)], 1)
        for subject in (Decoder(model), Reference(model)):
            subject.start(ids, fill="prefill", max_length=23)
            tokens = []
            for _ in range(3):
                subject.step()
                tokens.append(subject.ids)
            assert torch.equal(torch.cat(tokens, 1), wanted[:, 20:])
            assert subject.device_kv_bytes() == 2 * 22 * 3 * 2 * 2 * 32 * 4


def test_random_fill_has_the_length_of_a_prefill():
    model = random_model(quick_config(), CPU, torch.float32)
    subject = Decoder(model)
    with torch.inference_mode():
        subject.start(torch.randint(512, (2, 20)), fill="random", max_length=30)
        assert subject.cache.get_seq_length() == 19
        subject.step()
    assert subject.cache.get_seq_length() == 20
    assert subject.positions.tolist() == [[20], [20]]


def test_no_attention_leaves_out_the_cache():
    model = random_model(quick_config(), CPU, torch.float32)
    subject = NoAttention(model)
    with torch.inference_mode():
        subject.start(torch.randint(512, (2, 20)), fill="prefill", max_length=30)
        subject.step()
    assert subject.cache.get_seq_length() == 0
    assert subject.ids.shape == (2, 1)


# ---- the decode suite --------------------------------------------------------------------------------------


def test_quick_run_writes_rows_and_both_figures(tmp_path):
    """The whole suite in small: every case, blocks evicted and loaded, bytes that add up, figures."""
    assert main(["decode", "--quick", "--out", str(tmp_path)]) == 0
    rows = [r for r in read_rows(tmp_path / "rows.csv") if r["metric"] == "step"]
    cases = {(r["baseline"], r["context_len_tokens"], r["batch"], r["forced_miss_rate"]) for r in rows}
    contexts = [(c, b) for c in (192.0, 320.0) for b in (1.0, 2.0)]
    assert {("rheo", c, b, rate) for c, b in contexts for rate in (0.0, 0.2)} <= cases
    assert {("stock", c, b, None) for c, b in contexts} <= cases
    ours = [r for r in rows if r["baseline"] == "rheo"]
    assert all(r["status"] == "ok" and 0 < r["p20"] <= r["p50"] <= r["p80"] and r["n"] == 4 for r in ours)
    assert any(r["evicted_blocks"] > 0 and r["missed_blocks"] > 0 for r in ours)
    block_bytes, layers, heads = 2 * 16 * 32 * 4, 3, 2
    for row in ours:
        written = row["batch"] * layers * heads * 2 * 32 * 4
        assert row["bytes_moved"] == pytest.approx(row["missed_blocks"] * block_bytes + written, rel=1e-5)
        assert 0 <= row["hit_rate"] <= 1
        assert row["frac_of_floor"] == pytest.approx(row["floor_ms"] / row["p50"], rel=1e-4)
    (offloaded,) = {r["status"] for r in rows if r["baseline"] == "hf-offloaded"}
    assert offloaded == ("ok" if torch.cuda.is_available() else "unsupported")
    assert "resolved" in (tmp_path / "config.yaml").read_text()
    assert "measured_bytes_per_s" in (tmp_path / "env.json").read_text()

    for name in (plots.THROUGHPUT, plots.SPLIT):
        (tmp_path / name).unlink()
    assert main(["plot", str(tmp_path)]) == 0
    assert all((tmp_path / name).stat().st_size > 10_000 for name in (plots.THROUGHPUT, plots.SPLIT))


def test_random_fill_of_ours_decodes_and_misses(sweep):
    rows = [r for r in rows_of(replace(sweep, fill="random")) if r.baseline == "rheo" and r.metric == "step"]
    assert [r.status for r in rows] == ["ok"]
    assert rows[0].fill == "random" and rows[0].hit_rate is not None


def test_wrong_tokens_give_a_row_without_a_time(sweep, monkeypatch):
    real = executor.decode_full
    monkeypatch.setattr(executor, "decode_full", lambda *args: real(*args) * 0)
    (row,) = rows_of(sweep)
    assert (row.status, row.baseline, row.p50, row.n) == ("wrong", "rheo", None, 0)
    assert "differs from stock" in row.error


def test_a_lost_transfer_is_wrong_too(sweep, monkeypatch):
    """With everything resident nothing is loaded: only the pass with dropped blocks can see it."""
    real = executor.kernels_for

    def without_loads(*args):
        ops = real(*args)
        fetch = ops.attend_fetch

        def attend_fetch(*tensors, **kw):
            count = tensors[10]
            fetch(*tensors[:10], torch.zeros_like(count), *tensors[11:], **kw)

        ops.attend_fetch = attend_fetch
        return ops

    monkeypatch.setattr(executor, "kernels_for", without_loads)
    (row,) = rows_of(sweep)
    assert row.status == "wrong"
    assert "blocks dropped" in row.error


def test_a_peer_without_memory_is_a_row_and_ours_goes_on(sweep, monkeypatch):
    real = Decoder.start

    def start_but_stock(self, *args, **kwargs):
        if self.name == "stock":
            raise torch.OutOfMemoryError("no room for 32 GiB\nhint")
        real(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "start", start_but_stock)
    rows = rows_of(sweep)
    (stock,) = [r for r in rows if r.baseline == "stock"]
    assert (stock.status, stock.error, stock.p50) == ("oom", "no room for 32 GiB", None)
    assert {r.status for r in rows if r.baseline == "rheo"} == {"ok"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quick", "--baselines", "stock,vllm"], "vllm"),
        ([], "--model"),
        (["--model", "missing.json"], "missing.json"),
        (["--quick", "cache.block_sze=16"], "cache.block_size"),
        (["--model", "x", "--steps", "1"], "--steps"),
    ],
)
def test_senseless_requests_are_refused_by_name(words, message, tmp_path, capsys):
    assert main(["decode", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_context_shorter_than_the_session_is_refused(sweep):
    with pytest.raises(ValueError, match="context 10"):
        rows_of(sweep, context=10)


# ---- figures -----------------------------------------------------------------------------------------------


def test_figures_without_matplotlib_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(tmp_path)]) == 2
    assert "[plot] extra" in capsys.readouterr().err


def test_figures_of_an_empty_folder_say_so(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "rows.csv" in capsys.readouterr().err


# ---- the gather suite --------------------------------------------------------------------------------------


def test_gather_suite_reports_time_and_rate(tmp_path):
    assert main(["gather", "--quick", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert {r["case_id"] for r in rows} == {"large-copy"} | {
        f"gather-{kib}KiB-x{n}" for kib in (4, 16, 32) for n in (64, 256)
    }
    for time_row, rate_row in zip(rows[1::2], rows[2::2], strict=True):
        assert time_row["case_id"] == rate_row["case_id"]
        assert rate_row["p50"] == pytest.approx(time_row["bytes_moved"] / time_row["p50"] / 1e6, rel=0.3)


def test_a_gather_that_loses_a_block_has_no_time(monkeypatch):
    real = gather_suite.kernels_for(CPU).gather

    def lossy(load_src, load_dst, load_count, *rest):
        real(load_src, load_dst, load_count - 1, *rest)
        rest[-1].add_(1)

    monkeypatch.setattr(gather_suite, "kernels_for", lambda device: SimpleNamespace(gather=lossy))
    rows: list[Row] = []
    gather_suite.run_gather(True, CPU, rows.append)
    assert {r.status for r in rows[1:]} == {"wrong"}
    assert all(r.p50 is None and "differ" in r.error for r in rows[1:])
