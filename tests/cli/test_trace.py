"""`rheo trace` from the command line: record, replay, report, and every refusal."""

import json
from pathlib import Path

import numpy as np
import pytest

from rheo_offload.cli.main import main
from rheo_offload.cli.trace import geometry
from rheo_offload.trace.file import Trace
from tests.cli.conftest import save_tiny_model

PROMPT = "The quick brown fox jumps over the lazy dog. " * 6
SETTINGS = [
    "cache.block_size=16",
    "selection.token_budget=96",
    "cache.device_memory=floor",
    "cache.host_memory=64MiB",
]


def trace(*argv: object) -> int:
    return main(["trace", *map(str, argv)])


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    file.write_text(PROMPT)
    return file


def record(model_dir: Path, prompt_file: Path, out: Path, *more: object) -> int:
    return trace(
        "record", "--model", model_dir, "--prompt-file", prompt_file, "--out", out, "--max-new-tokens", 40,
        "--device", "cpu", "--dtype", "float32", *more, *SETTINGS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(model_dir: Path, prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trace") / "run.npz"
    assert record(model_dir, prompt_file, out) == 0
    return out


def test_record_writes_a_trace_of_the_run(recorded: Path, model_dir: Path):
    found = Trace.load(recorded)
    assert found.ids.shape == (2, 1, 2, 40, 6)
    assert found.lens[0, 0] == len(PROMPT) + 1 and found.meta["model"] == str(model_dir)


def test_record_says_what_it_wrote(model_dir: Path, prompt_file: Path, tmp_path: Path, capsys):
    assert record(model_dir, prompt_file, tmp_path / "t.npz", "--max-new-tokens", 5) == 0
    out = capsys.readouterr().out
    assert "5 steps x 2 layers x 1 row(s) x 2 KV heads" in out and str(tmp_path / "t.npz") in out


def test_replay_prints_tables(recorded: Path, model_dir: Path, capsys):
    assert trace("replay", recorded, "--model", model_dir, "--batch", "1,8") == 0
    out = capsys.readouterr().out
    assert "misses in every step as many blocks as it did" in out
    for word in (
        "fifo",
        "belady",
        "previous-layer",
        "1.25 x",
        "tok/s",
        "link 50 GB/s",
        "2 layers x 2 KV heads",
    ):
        assert word in out


def test_replay_as_json(recorded: Path, capsys):
    argv = [
        "--json",
        "--capacity",
        "1.0,1.5",
        "--policies",
        "lru,belady",
        "--target",
        "32x8x32",
        "--skip",
        10,
    ]
    assert trace("replay", recorded, *argv, "--link-gbs", 25, "--batch", 4) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["disagreement"] == 0 and found["skipped_steps"] == 10
    assert [(r["policy"], r["ratio"]) for r in found["replays"]] == [
        ("lru", 1.0), ("lru", 1.5), ("belady", 1.0), ("belady", 1.5),
    ]  # fmt: skip
    misses = Trace.load(recorded).misses[..., 10:]
    assert found["run"]["demand_blocks_per_step"] == pytest.approx(misses.mean())
    assert found["machine"]["block_bytes"] == 32768 and found["machine"]["link_bytes_per_s"] == 25e9
    assert [f["ratio"] for f in found["forecasts"]] == [1.0, 1.5]  # 1.5 is the run's own


def test_report_writes_a_page(recorded: Path, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    assert trace("report", recorded, "--out", tmp_path / "report", "--link-gbs", 50, "--capacity", "1,2") == 0
    assert (tmp_path / "report" / "report.html").read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.count(".png") == 4


# ---- refused -------------------------------------------------------------------------------------------------


def test_a_trace_of_another_model_is_refused(recorded: Path, tmp_path: Path, capsys):
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    assert trace("replay", recorded, "--model", tmp_path) == 2
    assert "this is a trace of" in capsys.readouterr().err


def test_a_truncated_trace_is_refused(recorded: Path, tmp_path: Path, capsys):
    cut = tmp_path / "cut.npz"
    cut.write_bytes(recorded.read_bytes()[:-100])
    for part in (["replay", cut], ["report", cut, "--out", tmp_path]):
        assert trace(*part) == 2
        assert "truncated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--capacity", "0.5"], "least is 1.0"),
        (["--policies", "lru,mru"], "unknown policy 'mru'"),
        (["--skip", "40"], "leaves nothing of 40"),
    ],
)
def test_impossible_replays_are_refused(recorded: Path, capsys, argv, reason):
    assert trace("replay", recorded, *argv) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--target", "32x8"],
        ["--link-gbs", "0"],
        ["--hbm-gbs", "nan"],
        ["--batch", "0"],
        ["--capacity", "one"],
        ["--skip", "-1"],
        ["cache.block_size=16"],
    ],
)
def test_malformed_options_are_refused(recorded: Path, argv, capsys):
    with pytest.raises(SystemExit):
        trace("replay", recorded, *argv)


def test_record_refuses_before_the_weights_are_loaded(prompt_file: Path, tmp_path: Path, capsys):
    nowhere = tmp_path / "no model"
    assert record(nowhere, prompt_file, tmp_path / "missing" / "t.npz") == 2
    assert "is no directory" in capsys.readouterr().err
    assert record(nowhere, prompt_file, tmp_path / "t.npz", "--max-new-tokens", 0) == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_run_that_selects_nothing_is_refused(model_dir: Path, prompt_file: Path, tmp_path: Path, capsys):
    assert record(model_dir, prompt_file, tmp_path / "t.npz", "selection.method=full") == 2
    assert "no layer of this run selects blocks" in capsys.readouterr().err
    assert not (tmp_path / "t.npz").exists()


def test_an_interrupted_run_is_saved(model_dir: Path, prompt_file: Path, tmp_path: Path, monkeypatch):
    from rheo_offload.cli import generate

    def interrupt(self: generate.Recorder, row: int, token: int) -> None:
        self.new_tokens[row].append(token)
        if len(self.new_tokens[row]) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(generate.Recorder, "add", interrupt)
    assert record(model_dir, prompt_file, tmp_path / "t.npz") == 130
    found = Trace.load(tmp_path / "t.npz")
    assert 7 <= found.steps <= 8 and np.isfinite(found.misses.mean())


def test_geometry():
    assert geometry("32x8x32") == (32, 8, 32.0) and geometry("2X1X0.5") == (2, 1, 0.5)
