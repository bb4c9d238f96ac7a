"""`rheo eval` end to end on a tiny model: rows, tables, resuming, refusals, and rows that prove nothing."""

import argparse
import dataclasses
import importlib
import json
import runpy
import sys

import pytest

from rheo_offload.cli import eval as verb
from rheo_offload.cli.main import main
from rheo_offload.errors import ConfigError, RheoError
from rheo_offload.eval.log import EvalLog, Row
from rheo_offload.eval.plots import write_plots
from rheo_offload.eval.report import PARTS, TITLES, method_table, task_tables
from rheo_offload.eval.setups import setups_of
from rheo_offload.eval.suite import TASKS, Evaluation, tasks_of, why_invalid
from rheo_offload.selection.policy import METHODS

SMALL = [
    "--device",
    "cpu",
    "--contexts",
    "600",
    "--depths",
    "0.3",
    "--scored-tokens",
    "12",
    "--long-tokens",
    "12",
]


def evaluate(model_dir, out, *more: str) -> int:
    return main(["eval", "--model", str(model_dir), *SMALL, "--out", str(out), *more, "cache.block_size=16"])


def rows_of(out) -> list[dict]:
    records = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return [record for record in records if record["record"] == "row"]


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """Every task but json (its log needs more room), two methods, two budgets."""
    out = tmp_path_factory.mktemp("finished")
    methods = ["--methods", "mean_key,streaming", "--budgets", "128,1024"]
    tasks = ["--tasks", "needle,ruler,long_generation,perplexity,kl"]
    own = ["streaming:selection.sink_blocks=2", "streaming:audit.logits=true"]
    assert evaluate(model_dir, out, *tasks, *methods, *own) == 0
    return out


def test_every_case_has_a_row_for_every_method_and_budget(finished):
    rows = rows_of(finished)
    setups = [("dense", None)] + [(m, b) for m in ("mean_key", "streaming") for b in (128, 1024)]
    cases = {(row["task"], row["case"]) for row in rows}
    assert {(r["task"], r["case"], r["method"], r["token_budget"]) for r in rows} == {
        (*case, *setup) for case in cases for setup in setups
    }
    assert len(rows) == len(cases) * len(setups) == (2 + 3 + 1 + 1 + 1) * 5


def test_rows_count_what_moved(finished):
    for row in rows_of(finished):
        if row["method"] == "dense":
            assert row["valid"] is None and row["decode_steps"] is None and row["dense_question"] is None
            continue
        assert row["decode_steps"] > 0 and 0 < row["captured_mass_mean"] <= 1 + 1e-6
        assert 0 <= row["output_error_mean"] <= row["output_error_max"]
        if row["method"] == "streaming":
            assert 0 <= row["logit_kl_mean"] <= row["logit_kl_max"]
            assert (row["logit_kl_max"] > 1e-4) == (row["token_budget"] == 128)
        else:
            assert row["logit_kl_mean"] is None, "not asked for"
        assert (row["dense_question"] is not None) == (row["task"] in ("needle", "ruler"))
        moved = row["evicted_blocks"] > 0 and row["miss_blocks"] > 0
        assert row["valid"] is moved and (row["invalid_because"] is None) is moved
        assert moved == (row["method"] == "mean_key" and row["token_budget"] == 128)
        assert (row["h2d_bytes"] > 0) == (row["miss_blocks"] > 0)


def test_a_budget_that_holds_everything_is_the_dense_model(finished):
    rows = {(r["task"], r["case"], r["method"], r["token_budget"]): r for r in rows_of(finished)}
    for (task, case, method, budget), row in rows.items():
        if method != "mean_key" or budget != 1024:
            continue
        dense = rows[task, case, "dense", None]
        assert row["answer"] == dense["answer"]
        for name, value in dense["metrics"].items():
            assert row["metrics"][name] == pytest.approx(value, abs=2e-3, rel=1e-3), (task, name)


def test_the_log_says_what_was_run(finished):
    first, *others = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    assert first["record"] == "run" and first["identity"]["seed"] == 0 and first["versions"]["torch"]
    configs = {(r["method"], r["token_budget"]): r["config"] for r in others if r["record"] == "config"}
    assert set(configs) == {(m, b) for m in ("mean_key", "streaming") for b in (128, 1024)}
    assert all(c["cache"]["capacity_ratio"] == 1.5 for c in configs.values())
    assert configs["streaming", 128]["selection"]["sink_blocks"] == 2
    assert configs["mean_key", 128]["selection"]["sink_blocks"] == 1


def test_tables(finished):
    report = (finished / "table.md").read_text()
    assert "| mean_key | 128 |" in report and "### perplexity" in report and "4 invalid" not in report
    lines = [line for line in report.splitlines() if line.startswith("| streaming | 128 |")]
    assert all("†" in line for line in lines) and "no block was evicted and loaded again" in report
    assert not any("†" in line for line in report.splitlines() if line.startswith("| mean_key | 128 |"))


def test_a_finished_evaluation_loads_nothing(finished, model_dir, capsys, monkeypatch):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("the weights were loaded"))
    before = (finished / "rows.jsonl").read_bytes()
    assert (
        evaluate(
            model_dir,
            finished,
            "--tasks",
            "needle,kl",
            "--methods",
            "mean_key",
            "--budgets",
            "128",
            "--table",
        )
        == 0
    )
    assert (finished / "rows.jsonl").read_bytes() == before
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith(
        "| method | budget | captured mass | hit rate | KiB / token | found | KL, nats |"
    )
    assert [line.split(" | ")[0] for line in table[2:]] == ["| dense", "| mean_key"]


def test_resuming_does_what_is_missing_and_drops_a_torn_line(model_dir, tmp_path, capsys):
    argv = ["--tasks", "needle", "--methods", "mean_key", "--no-dense-question"]
    assert evaluate(model_dir, tmp_path, *argv, "--budgets", "128") == 0
    file = tmp_path / "rows.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:-1]) + whole[-1][:40])  # killed while it wrote the last row
    capsys.readouterr()
    assert evaluate(model_dir, tmp_path, *argv, "--budgets", "128,192", "--json") == 0
    shown = capsys.readouterr()
    assert "3 of 6 rows to do" in shown.err
    record = json.loads(shown.out)
    assert len(record["rows"]) == 6 and record["identity"]["dense_question"] is False
    again = file.read_text().splitlines(keepends=True)
    assert again[: len(whole) - 1] == whole[:-1] and all(json.loads(line) for line in again)
    old, new = json.loads(whole[-1]), [row for row in rows_of(tmp_path) if row["token_budget"] == 128][-1]
    assert {**old, "seconds": 0} == {**new, "seconds": 0}, "seeds and cases are fixed"
    assert sum(json.loads(line)["record"] == "run" for line in again) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], "another seed (0, now 1)"),
        (["--no-dense-question"], "another dense_question (True, now False)"),
        (["selection.sink_blocks=2"], "another mean_key at 128 tokens: selection.sink_blocks (1, now 2)"),
        (["--dtype", "bfloat16"], "another dtype ('float32', now 'bfloat16')"),
    ],
)
def test_another_evaluation_is_not_continued(finished, model_dir, capsys, more, message):
    argv = ["--tasks", "needle", "--methods", "mean_key", "--budgets", "128"]
    assert evaluate(model_dir, finished, *argv, *more) == 2
    error = capsys.readouterr().err
    assert message in error and "give another --out" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "needel"], "unknown task 'needel'; did you mean 'needle'?"),
        (["--methods", "mean_kye"], "unknown method 'mean_kye'; did you mean 'mean_key'?"),
        (["--methods", "quest,quest"], "the method 'quest' is named twice"),
        (["--budgets", "16"], "it must be at least"),
        (["--contexts", "2040", "--tasks", "needle"], "more than the model's 2048; shorten --contexts"),
        (["qest:cache.block_size=32", "--methods", "quest"], "unknown method 'qest'; did you mean 'quest'?"),
        (["selection.params={'x':1}"], "selection.params"),
        (["cache.block_sze=16"], "did you mean 'cache.block_size'?"),
        (["--text", "nowhere.txt"], "cannot read 'nowhere.txt'"),
        (["--methods", "nowhere.yaml"], "cannot read config 'nowhere.yaml'"),
        (["--methods", "mean_key,seer_r"], "selection.params.weights must be a safetensors file"),
        (
            ["--methods", "seer_r", "selection.params.weights=no.st"],
            "selection.params.weights must be a file",
        ),
        (["--methods", "nosa", "selection.params.weights=no.st"], "selection.params.weights must be a file"),
        (
            ["--methods", "duo", "selection.params.heads=no.tsv"],
            "selection.params.heads: cannot read 'no.tsv'",
        ),
        (
            ["--methods", "moa", "selection.params.plan=no.json"],
            "selection.params.plan: cannot read 'no.json'",
        ),
        (
            ["selection.reuse_layers=no.json"],
            "selection.reuse_layers must be pairs of layers, or a file that exists",
        ),
    ],
)
def test_bad_input_is_refused_before_the_weights(model_dir, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("the weights were loaded"))
    assert evaluate(model_dir, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_methods_by_label_and_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("selection: {method: moba}\n")
    setups = setups_of(
        ["a=mean_key", "b=mean_key", str(tmp_path / "mine.yaml"), "full", "ssa"],
        [1024, 2048],
        ["cache.block_size=32", "b:cache.block_size=64"],
    )
    assert [(s.method, s.token_budget) for s in setups if s.config is None] == [("dense", None)]
    by_label = {(s.method, s.token_budget): s.config for s in setups if s.config is not None}
    assert by_label["a", 1024].cache.block_size == 32 and by_label["b", 2048].cache.block_size == 64
    assert by_label[str(tmp_path / "mine.yaml"), 1024].selection.method == "moba"
    assert [budget for label, budget in by_label if label == "full"] == [1024], "its budget changes nothing"
    for config in by_label.values():
        assert (config.cache.capacity_ratio, config.cache.device_memory) == (1.5, "floor")
        assert config.selection.recent_blocks == "auto"
    with pytest.raises(ConfigError):
        setups_of(["quest"], [1024], ["cache.nonsense=1"])
    with pytest.raises(RheoError, match="named twice"):
        setups_of(["dense=quest"], [1024])


def test_files_of_another_model_are_refused_before_the_dense_rows(model_dir, tmp_path, capsys, monkeypatch):
    """What only the model can tell: a plan of the wrong shape, named last, and nothing has been asked yet."""
    plan = tmp_path / "plan.json"
    plan.write_text('{"alphas": [[1.0]], "betas": [[0.0]]}')
    monkeypatch.setattr(Evaluation, "_dense", lambda *a: pytest.fail("the stock model was asked"))
    more = ["--methods", "mean_key,moa", f"moa:selection.params.plan={plan}", "--tasks", "needle"]
    assert evaluate(model_dir, tmp_path / "out", *more) == 2
    assert "selection.params.plan" in capsys.readouterr().err


def test_every_method_is_taken_by_its_own_name():
    files = ("seer_r", "duo", "moa")  # refused without theirs
    names = [name for name in METHODS if name not in files]
    methods = {s.method: s.config.selection.method for s in setups_of(names, [4096 * 4])[1:]}
    assert methods == {name: name for name in names}
    for name in files:
        with pytest.raises(ConfigError, match=r"selection\.params\."):
            setups_of([name], [1024])


def test_dense_is_always_there_and_needs_no_naming():
    assert [s.method for s in setups_of(["dense", "quest"], [1024])] == ["dense", "quest"]
    assert [task.name for task in tasks_of(["kl", "needle", "kl"])] == ["kl", "needle"]


def test_rows_that_prove_nothing():
    assert why_invalid(3, 4) is None
    assert why_invalid(0, 4) == "no block was evicted"
    assert why_invalid(0, 0) == "no block was evicted or loaded again"


def test_a_log_of_something_else_is_refused(tmp_path):
    for text in ('{"record": "other"}\n', "[1]\n", "not json\n", '{"record": "row", "task": "needle"}\n'):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(RheoError, match="give another --out"):
            EvalLog(tmp_path, run={"identity": {}}, configs={})


def row(task: str, method: str, budget: int | None, context: int = 1024, **metrics: float) -> Row:
    more = {} if budget is None else dict(decode_steps=4, selected_blocks=10, miss_blocks=5, evicted_blocks=5,
                                          h2d_bytes=4096, valid=True, captured_mass_mean=0.5)  # fmt: skip
    case = f"context={context} depth=0.5 keys=1 sample=0"
    return Row(
        task=task,
        case=case,
        method=method,
        token_budget=budget,
        context_len_tokens=context,
        metrics=metrics,
        **more,
    )


def test_the_table_weighs_bytes_by_steps():
    rows = [row("needle", "quest", 512, score=1.0), row("kl", "quest", 512, kl=0.25, tokens=8.0)]
    line = method_table(rows).splitlines()[2]
    assert line == "| quest | 512 | 0.500 | 0.5000 | 1.0 | 1 | 0.25 |"


def test_the_table_has_the_divergence_of_the_logits_where_it_was_measured():
    rows = [row("needle", "dense", None, score=1.0), row("needle", "quest", 512, score=1.0)]
    rows.append(dataclasses.replace(rows[-1], method="mean_key", logit_kl_mean=0.25, logit_kl_max=1.0))
    head, _, *lines = method_table(rows).splitlines()
    assert head == "| method | budget | captured mass | logit KL | hit rate | KiB / token | found |"
    assert lines[1:] == [
        "| quest | 512 | 0.500 |  | 0.5000 | 1.0 | 1 |", "| mean_key | 512 | 0.500 | 0.25 | 0.5000 | 1.0 | 1 |"
    ]  # fmt: skip
    assert "| logit KL |" in task_tables(rows)


def test_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = [
        row("needle", m, b, c, score=1.0) for m, b in (("dense", None), ("quest", 512)) for c in (1024, 2048)
    ]
    rows += [row("kl", "dense", None, kl=0.0, tokens=8.0), row("kl", "quest", 512, kl=0.2, tokens=8.0)]
    written = write_plots(rows, tmp_path)
    assert [file.name for file in written] == ["quality.png", "needle.png"]
    assert all(file.stat().st_size > 5000 for file in written)
    with pytest.raises(RheoError, match="no rows"):
        write_plots([], tmp_path)


def test_plots_without_matplotlib_are_refused_first(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verb, "load", lambda *a, **k: pytest.fail("the weights were loaded"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluate(model_dir, tmp_path, "--plots") == 2
    assert "install the [plot] extra" in capsys.readouterr().err


def test_every_task_has_columns():
    assert set(PARTS) == set(TASKS) and set(TASKS) <= set(TITLES)


def test_lists_name_each_value_once():
    assert verb.numbers("512,1024,512") == [512, 1024] and verb.depths("0.5,0.1,.5") == (0.5, 0.1)
    for wrong in ("0", "a", ""):
        with pytest.raises(ValueError if wrong != "0" else argparse.ArgumentTypeError):
            verb.numbers(wrong)
    for read, wrong in ((verb.depths, "1.5"), (verb.key_counts, "99")):
        with pytest.raises(argparse.ArgumentTypeError):
            read(wrong)


def test_a_text_of_ones_own(tmp_path):
    (tmp_path / "book.txt").write_text("One line\nand another.\n\n\n\nThe end.\n")
    assert verb.read_paragraphs(str(tmp_path / "book.txt")) == ("One line and another.", "The end.")
    (tmp_path / "empty.txt").write_text("\n\n \n")
    with pytest.raises(RheoError, match="is empty"):
        verb.read_paragraphs(str(tmp_path / "empty.txt"))


def test_the_harness_adapter_says_what_it_needs(monkeypatch):
    monkeypatch.delitem(sys.modules, "rheo_offload.eval.lm_eval_adapter", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(RheoError, match="pip install 'lm_eval"):
        importlib.import_module("rheo_offload.eval.lm_eval_adapter")


def test_the_adapter_without_the_harness_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "rheo_offload.eval.lm_eval_adapter", raising=False)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="pip install 'lm_eval"):
        runpy.run_module("rheo_offload.eval.lm_eval_adapter", run_name="__main__")
