"""eval.fidelity: nothing lost at full budget, something below it, and lent history is as good as a prefill."""

import csv
import json

import pytest

from rheo_offload import offload, restore
from rheo_offload.errors import RheoError
from rheo_offload.eval import fidelity
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import BLOCK, prompt, sparse_config


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def read(request):
    model = tiny_model(request.param, device=DEVICE)
    return model, fidelity.read_densely(model, prompt(412), prompt_tokens=400)


def test_full_budget_loses_nothing_and_a_small_one_something(read):
    model, dense = read
    rows = list(
        fidelity.compare(
            model, dense, name="tiny", budgets=[6, 32], config=sparse_config(),
            variants=["selection.remainder=none", "selection.remainder=centroid"],
        )
    )  # fmt: skip
    assert [(r.budget_blocks, r.variant.split("=")[1]) for r in rows] == [
        (6, "none"), (6, "centroid"), (32, "none"), (32, "centroid")
    ]  # fmt: skip
    for row in rows[:2]:
        assert row.kl_mean > 1e-3 and row.miss_blocks > 0 and row.output_error_mean > 0.01
        assert row.h2d_bytes == row.miss_blocks * 2 * BLOCK * 16 * 4
    for row in rows[2:]:
        assert row.kl_mean < 1e-6 and row.same_token == 1 and row.output_error_mean < 1e-5
        assert row.nll == pytest.approx(row.dense_nll, rel=1e-5)
    assert not hasattr(model, "rheo")


@pytest.mark.parametrize("index", ["flat", "two_level"])
def test_lent_history_equals_a_prefill(read, index):
    model, dense = read
    assert len(dense.kv) == len(model.model.layers)
    config = sparse_config(
        selection={"index": index, "index_group": 4},
        prefill={"chunk_tokens": fidelity.OWN_TOKENS},
        audit={"every": 1},
    )
    lent = fidelity.measure(model, dense, config)
    offload(model, config)
    cache = model.rheo.new_cache(max_length=412)
    # the same last chunk, so that heat starts from the same queries
    model.rheo.prefill(cache, dense.ids[:, : 400 - fidelity.OWN_TOKENS], warm=False)
    model.rheo.prefill(cache, dense.ids[:, :400])
    log_probs = fidelity._feed(model, dense.ids[:, 400:], cache)
    stats = model.rheo.stats(cache)
    layers = cache.executor.cache.full.values()
    assert any(cache.executor.groups_of(layer) is not None for layer in layers) == (index == "two_level")
    restore(model)
    kl = (dense.log_probs.exp() * (dense.log_probs - log_probs)).sum(-1)
    assert lent["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert lent["captured_mass_mean"] == pytest.approx(stats.captured_mass_mean, rel=1e-4)


def test_the_command_line_writes_rows(tmp_path, monkeypatch, capsys):
    model = tiny_model("llama", device=DEVICE)
    monkeypatch.setattr(fidelity, "load", lambda *args, **kwargs: (model, None))
    monkeypatch.setattr(fidelity, "text_ids", lambda tokenizer, tokens, text: prompt(tokens))
    out = tmp_path / "out"
    args = ["--context", "100", "--steps", "3", "--budgets", "4", "--out", str(out), "cache.block_size=16"]
    assert fidelity.main([*args, "--vary", "selection.recent_blocks=2"]) == 0
    rows = list(csv.DictReader((out / "rows.csv").open()))
    assert [row["variant"] for row in rows] == ["selection.recent_blocks=2"] and float(
        rows[0]["kl_mean"]
    ) >= 0
    assert json.loads((out / "env.json").read_text())["config"]["cache"]["block_size"] == 16
    assert "kl" in capsys.readouterr().out
    assert fidelity.main([*args, "--vary", "selection.remainde=none"]) == 2
    assert "did you mean 'selection.remainder'" in capsys.readouterr().err
    assert fidelity.main(["--context", "9999", "--out", str(out)]) == 2
    assert "positions; shorten one of them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fidelity.main([*args, "--budgets", "few"])
    assert "--budgets must be numbers of blocks" in capsys.readouterr().err


class Words:
    """A tokenizer that numbers the words of each text it is given."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(range(len(text.split())))}


def test_a_text_of_ones_own_is_read(tmp_path, monkeypatch, capsys):
    assert fidelity.text_ids(Words(), 4, "a b c d e").tolist() == [[1, 0, 1, 2]]
    with pytest.raises(RheoError, match="has 6 tokens, too few for 7"):
        fidelity.text_ids(Words(), 7, "a b c d e")

    seen = []
    monkeypatch.setattr(fidelity, "load", lambda *args, **kwargs: (tiny_model("llama", device=DEVICE), None))
    monkeypatch.setattr(fidelity, "text_ids", lambda t, tokens, text: seen.append(text) or prompt(tokens))
    (tmp_path / "own.txt").write_text("my\nown", encoding="utf-8")
    args = [
        "--context",
        "100",
        "--steps",
        "2",
        "--budgets",
        "4",
        "cache.block_size=16",
        "--out",
        str(tmp_path),
    ]
    assert fidelity.main([*args, "--text", str(tmp_path / "own.txt")]) == 0
    assert seen == ["my\nown"]
    assert fidelity.main([*args, "--text", str(tmp_path / "other.txt")]) == 2
    assert "cannot read the text" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused():
    assert fidelity.text_ids(Words(), 100).shape == (1, 100)
    with pytest.raises(RheoError, match="too few for 10000000"):
        fidelity.text_ids(Words(), 10**7)
