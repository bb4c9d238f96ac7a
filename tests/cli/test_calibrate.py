"""`rheo calibrate` from text to a side file that a run then uses; what is refused, and that nothing is written then."""

import json
import random

import pytest

from rheo_offload.cli.main import main

WORDS = (
    "the",
    "block",
    "holds",
    "keys",
    "and",
    "values",
    "of",
    "tokens",
    "that",
    "were",
    "read",
    "long",
    "ago",
)
SMALL = ["--context", "384", "--block-size", "16", "--budget", "96", "--queries", "32", "--score-steps", "40"]
SMALL += ["--steps", "20", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(rng.choice(WORDS) for _ in range(350)))
    return file


def calibrate(model, text, out, *more):
    return main(["calibrate", str(model), "--data", str(text), "--out", str(out), *SMALL, *more])


def test_the_side_file_drives_a_run(model_dir, text, tmp_path, capsys):
    """Fit the gate, then decode with it: the file is found, fits the model, and selects."""
    out = tmp_path / "side.safetensors"
    assert calibrate(model_dir, text, out) == 0
    printed, err = capsys.readouterr()
    for part in (
        "eviction.0",
        "gate.1",
        "oracle",
        "mean_key",
        "eviction head",
        "hits at 1.5x",
        f"written: {out}",
    ):
        assert part in printed
    assert "reading" in err and "fitting" in err, "progress is on stderr"
    run = ["generate", "--model", str(model_dir), "--prompt", "a token that was read " * 15, "--json"]
    run += ["--max-new-tokens", "8", "--device", "cpu", "--dtype", "float32", "cache.block_size=16"]
    run += ["selection.method=seer_r", f"selection.params.weights={out}", "selection.token_budget=96"]
    assert main([*run, "cache.host_memory=64MiB"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["new_tokens"] == 8


def test_json_is_one_record(model_dir, text, tmp_path, capsys):
    out = tmp_path / "side.safetensors"
    assert (
        calibrate(model_dir, text, out, "--kind", "gate", "--target", "mass", "--windows", "3", "--json") == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 3 * 384 and set(record["losses"]) == {"gate.0", "gate.1"}
    assert {row["query"] for row in record["score"]} == {"oracle", "mean_key", "gate"}
    assert all(after <= before for before, after, _ in record["losses"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing.txt"], "cannot read nothing.txt"),
        (["--out", "no/such/place.safetensors"], "'no/such' is no directory"),
        (["--out", "side.bin"], "--out must end in .safetensors"),
        (["--budget", "16"], "the budget must leave a choice"),
        (["--budget", "320"], "at most half the window"),
        (["--score-steps", "200"], "too short for 264 scored queries: give a longer --context"),
    ],
)
def test_refused_before_the_model_is_read(text, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert calibrate("no-such-model", text, tmp_path / "side.safetensors", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_too_little_text_or_none_is_refused(model_dir, text, tmp_path, capsys):
    out = tmp_path / "side.safetensors"
    assert calibrate(model_dir, text, out, "--context", "1024") == 2
    assert "3 windows of --context 1024 need 3069" in capsys.readouterr().err
    text.write_text(text.read_text() * 3)
    assert calibrate(model_dir, text, out, "--context", "1024") == 2
    assert (
        "windows of 1024 tokens are longer than the 512 positions it was made for" in capsys.readouterr().err
    )
    text.write_text(" \n")
    assert calibrate(model_dir, text, out) == 2
    assert "there is no text in" in capsys.readouterr().err
    text.write_bytes(b"\xff\xfe\x00")
    assert calibrate(model_dir, text, out) == 2
    assert "cannot read" in capsys.readouterr().err
    assert calibrate(tmp_path / "no-model", model_dir / "config.json", out) == 2
    assert "there is no model directory" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--block-size", "24"], "power of two"),
        (["--lr", "-1"], "must be above 0"),
        (["--windows", "2"], "must be at least 3"),
        (["--kind", "all"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused(text, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit):
        calibrate("model", text, tmp_path / "side.safetensors", *option)
    assert message in capsys.readouterr().err
