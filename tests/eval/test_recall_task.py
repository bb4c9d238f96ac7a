"""`rheo eval` on models of the recall vocabulary: the packaged one by its own configuration, and who is refused."""

import json
import shutil

import pytest

from rheo_offload import RheoConfig
from rheo_offload.cli import eval as verb
from rheo_offload.cli.main import main
from rheo_offload.errors import RheoError
from rheo_offload.eval.log import Row
from rheo_offload.eval.recall import TASKS as RECALL_TASKS
from rheo_offload.eval.recall_task import Recall
from rheo_offload.eval.report import task_tables
from rheo_offload.eval.setups import setups_of
from rheo_offload.eval.suite import Evaluation, check_tasks, tasks_of
from rheo_offload.eval.task import Settings
from rheo_offload.model.loader import NATIVE_DIR, load, own_config
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model

ARGV = ["eval", "--model", "native", "--device", "cpu", "--contexts", "512", "--seed", "1"]
METHODS = ["--methods", "nosa,streaming,all=nosa", "--budgets", "256", "all:selection.token_budget=512"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Half of 512 tokens attended, and all of them; no task is named."""
    out = tmp_path_factory.mktemp("recall")
    assert main([*ARGV, *METHODS, "--out", str(out)]) == 0
    return out


def records(out, kind: str) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return {line["method"]: line for line in lines if line["record"] == kind}


def test_the_native_model_recalls_by_its_own_configuration(finished):
    rows = records(finished, "row")
    assert list(rows) == ["dense", "nosa", "streaming", "all"]
    assert all(row["task"] == "recall" and row["metrics"]["questions"] > 10 for row in rows.values())
    assert rows["dense"]["metrics"]["score"] >= 0.95 and rows["nosa"]["metrics"]["score"] >= 0.9
    assert rows["streaming"]["metrics"]["score"] < 0.7, "the choice of blocks is what counts"
    assert rows["nosa"]["valid"] and rows["nosa"]["captured_mass_mean"] > 0.5
    assert rows["all"]["metrics"] == rows["dense"]["metrics"] and not rows["all"]["valid"]
    assert rows["dense"]["valid"] is None and rows["dense"]["decode_steps"] is None


def test_the_log_says_where_the_dense_rows_come_from(finished):
    configs = {method: record["config"] for method, record in records(finished, "config").items()}
    geometry = ("sink_blocks", "recent_blocks")
    for config in configs.values():
        assert config["cache"]["block_size"] == 32
        assert [config["selection"][name] for name in geometry] == [1, 2]
    assert [configs[name]["selection"]["method"] for name in ("dense", "nosa")] == ["nosa", "nosa"]
    assert configs["dense"]["selection"]["token_budget"] > 32768, "more than the model has positions"
    assert configs["nosa"]["selection"]["params"]["weights"] == "heads.safetensors"
    assert configs["nosa"]["cache"]["capacity_ratio"] == 1.5 and configs["nosa"]["audit"]["every"] == 8


def test_a_finished_evaluation_loads_nothing(finished, capsys, monkeypatch):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("the weights were loaded"))
    argv = [*ARGV, "--methods", "nosa", "--budgets", "256", "--tasks", "recall", "--table"]
    assert main([*argv, "--out", str(finished)]) == 0
    assert "| recalled |" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["needle", "kl", "recall,perplexity"])
def test_text_means_nothing_to_the_native_model(tmp_path, capsys, monkeypatch, task):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("the weights were loaded"))
    assert main([*ARGV, "--tasks", task, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"the task {task.split(',')[-1]} is made of text" in error and "use --tasks recall" in error
    assert not list(tmp_path.iterdir())


def test_recall_means_nothing_to_another_model(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("the weights were loaded"))
    assert main(["eval", "--model", str(model_dir), "--tasks", "recall", "--out", str(tmp_path)]) == 2
    assert "this model's tokenizer is another one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_evaluation_refuses_by_the_tokenizer_it_is_given(source, model, monkeypatch):
    """As for a GGUF file, whose vocabulary is known only then."""
    monkeypatch.setattr(Recall, "job", lambda *a: pytest.fail("a prompt was made"))
    evaluation = Evaluation(tasks=[Recall()], setups=setups_of([], []), settings=Settings(contexts=(512,)))
    log = type("Log", (), {"rows": {}})()
    with pytest.raises(RheoError, match="tokenizer is another one"):
        evaluation.run(model, source.tokenizer, source.paragraphs, log)


def test_what_is_called_dense_attends_to_everything(source):
    """Of a GGUF file the positions are a guess; a context beyond it would be attended to in part."""
    _, tokenizer = load("native", device="cpu")
    setups = setups_of([], [], own=own_config("native"))
    evaluation = Evaluation(tasks=[Recall()], setups=setups, settings=Settings(contexts=(1 << 18,)))
    log = type("Log", (), {"rows": {}})()
    with pytest.raises(RheoError, match="more than the model's 131104; shorten --contexts"):
        evaluation.run(tiny_model("llama", device=DEVICE), tokenizer, source.paragraphs, log)


def test_a_model_with_a_bias_has_no_stock_model_to_compare_with():
    setups = setups_of([], [], own=own_config("native"))
    check_tasks(tasks_of(["needle", "perplexity"]), setups, recall=False)
    for task in ("kl", "long_generation"):
        with pytest.raises(RheoError, match=f"the task {task} compares with the stock model, which lacks"):
            check_tasks(tasks_of([task]), setups, recall=False)


def test_other_methods_get_the_models_geometry_and_their_own_everything_else(tmp_path):
    (tmp_path / "mine.yaml").write_text("{cache: {block_size: 16}, selection: {method: moba}}\n")
    mine = str(tmp_path / "mine.yaml")
    own = own_config("native")
    setups = setups_of(
        ["nosa", "infllm_v2", "quest", "wide=quest", mine], [512], ["wide:cache.block_size=64"], own=own
    )
    by_label = {s.method: s.config for s in setups}
    shape = {
        label: (c.cache.block_size, c.selection.sink_blocks, c.selection.recent_blocks)
        for label, c in by_label.items()
    }
    assert shape["infllm_v2"] == shape["quest"] == shape["nosa"] == (32, 1, 2)
    assert shape["wide"] == (64, 1, 2) and shape[mine] == (16, 1, "auto")
    assert by_label["nosa"].selection.params == own.selection.params
    assert by_label["nosa"].selection.query_agnostic_share == own.selection.query_agnostic_share
    packaged = RheoConfig.from_yaml("infllm_v2").selection
    assert by_label["infllm_v2"].selection.query_agnostic_share == packaged.query_agnostic_share
    assert by_label["infllm_v2"].selection.params == packaged.params


@pytest.mark.parametrize("override", ["selection.method=mean_key", "selection.params={bias: false}"])
def test_without_a_bias_the_dense_model_is_the_stock_one(override):
    own = RheoConfig.from_dict({"selection": {"method": "nosa"}}).with_overrides([override])
    assert setups_of([], [], own=own)[0].config is None


def test_the_stock_model_is_asked_where_there_is_no_own_configuration():
    """A random model of the vocabulary: its wrong answers count as such."""
    _, tokenizer = load("native", device="cpu")
    model = tiny_model("llama", vocab_size=len(tokenizer), device=DEVICE)
    log = type("Log", (), {"rows": {}, "append": lambda self, row: self.rows.update({row.key: row})})()
    settings = Settings(contexts=(128,), samples=2)
    evaluation = Evaluation(tasks=[Recall()], setups=setups_of(["full"], [64]), settings=settings)
    evaluation.run(model, tokenizer, [], log)
    assert [row.method for row in log.rows.values()] == ["dense", "dense", "full", "full"]
    assert all(row.metrics["score"] < 0.5 for row in log.rows.values())
    assert task_tables(list(log.rows.values())).count("\n") == 5


def test_sequences_depend_on_seed_and_case_alone():
    def ids(seed: int) -> list[list[int]]:
        settings = Settings(contexts=(200, 256), samples=2, seed=seed)
        return [Recall().job(case, None, settings).ids[0].tolist() for case in Recall().cases(settings)]

    assert ids(0) == ids(0) and len({*map(tuple, ids(0)), *map(tuple, ids(1))}) == 8
    assert [len(row) for row in ids(0)] == [200, 200, 256, 256]
    with pytest.raises(RheoError, match="no room for a question and its records; raise --contexts"):
        short = Settings(contexts=(12,))
        Recall().job(Recall().cases(short)[0], None, short)


def test_shares_are_of_questions(finished):
    """A sequence that asks more counts for more, in every column."""
    counts = records(finished, "row")["nosa"]["metrics"]
    assert sum(counts[f"{kind}_questions"] for kind in RECALL_TASKS) == counts["questions"]
    two = [
        {"score": 0.0, "questions": 2.0, "retrieval": 0.0, "retrieval_questions": 2.0},
        {"score": 5 / 6, "questions": 6.0, "retrieval": 5 / 6, "retrieval_questions": 6.0},
    ]
    assert Recall().summary(two) == 0.625
    assert Recall().summary([{"score": 1.0, "questions": 30.0}, {"score": 0.0, "questions": 10.0}]) == 0.75
    rows = [
        Row(task="recall", case=f"{i}", method="dense", token_budget=None, context_len_tokens=64, metrics=m)
        for i, m in enumerate(two)
    ]
    assert "| dense |  | 0.625 | 0.625 |  |  |" in task_tables(rows)


def test_a_log_is_of_one_kind_of_dense_model(tmp_path, capsys):
    """Its dense rows, made with the bias of a `rheo.yaml` or without, are not those of the other kind."""
    folder = shutil.copytree(NATIVE_DIR, tmp_path / "model")
    argv = ["eval", "--model", str(folder), "--device", "cpu", "--contexts", "256", "--budgets", "192"]
    argv += ["--methods", "mean_key", "cache.block_size=32", "--out"]
    (folder / "rheo.yaml").rename(folder / "off.yaml")
    assert main([*argv, str(tmp_path / "stock")]) == 0
    (folder / "off.yaml").rename(folder / "rheo.yaml")
    assert main([*argv, str(tmp_path / "biased")]) == 0
    capsys.readouterr()
    assert main([*argv, str(tmp_path / "stock")]) == 2
    assert "another dense ('stock', now 'with its bias')" in capsys.readouterr().err
    (folder / "rheo.yaml").unlink()
    assert main([*argv, str(tmp_path / "biased")]) == 2
    assert "another dense ('with its bias', now 'stock')" in capsys.readouterr().err


def test_the_dense_model_with_a_bias_takes_overrides_but_for_what_is_chosen():
    """An own configuration that audits logits is no obstacle: nothing is measured beside the dense model."""
    own = own_config("native").with_overrides(["audit.logits=true", "audit.every=8"])
    shared = ["selection.method=streaming", "execution.graph=off", "cache.block_size=64", "audit.every=4"]
    dense = setups_of([], [], shared, own=own, positions=1024)[0].config
    assert (dense.selection.method, dense.execution.graph, dense.cache.block_size) == ("nosa", "off", 64)
    assert dense.selection.token_budget == 1024 + 64
    assert (dense.audit.every, dense.audit.logits) == (0, False)


def test_a_padded_vocabulary_is_one_of_recall(tmp_path):
    """The tokenizer says what a model's words are; the embedding may have rows that no word uses."""
    _, tokenizer = load("native", device="cpu")
    tiny_model("llama", vocab_size=len(tokenizer) + 59).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    argv = ["eval", "--model", str(tmp_path), "--device", "cpu", "--contexts", "256", "--budgets", "192"]
    assert main([*argv, "cache.block_size=32", "--out", str(tmp_path / "out")]) == 0
    assert set(records(tmp_path / "out", "row")) == {"dense", "mean_key"}
