"""The demo on a tiny random model: what it builds, reports, refuses and returns."""

import argparse
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from rheo_offload.cli import demo, demo_native
from rheo_offload.cli.main import main
from rheo_offload.errors import RheoError
from rheo_offload.eval import needle
from rheo_offload.eval.needle import NeedlePrompt, needle_prompt
from rheo_offload.eval.texts import prose_paragraphs
from rheo_offload.model import loader
from tests.helpers.spelling_model import save_spelling_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random two-layer Llama with a tokenizer that spells most characters out as bytes."""
    return save_spelling_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def run_demo(model_dir, *more: str) -> int:
    small = ["--context", "640", "--budget", "64", "--max-new-tokens", "8", "cache.block_size=16"]
    return main(["demo", "--model", str(model_dir), "--device", "cpu", *small, *more])


# ---- text and prompt


def test_the_text_is_long_prose_without_repetition():
    paragraphs = prose_paragraphs()
    assert sum(map(len, paragraphs)) > 150_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert all("\n" not in p and ">>>" not in p and p[-1] in ".:" for p in paragraphs)
    assert not any(needle.VAULT in p for p in paragraphs)


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("length", [200, 1024])
def test_prompt(tokenizer, length, depth):
    prompt = needle_prompt(tokenizer, length, depth)
    text = tokenizer.decode(prompt.ids[0])
    fact = "The access code of vault Zephyr-9 is"
    assert prompt.ids.shape == (1, length) and prompt.ids[0, 0] == tokenizer.bos_token_id
    assert text.count(prompt.answer) == 1 and text.count(f"{fact} {prompt.answer}.\n\n") == 1
    assert text.endswith(f"\n\n{fact}")
    assert tokenizer.decode(prompt.ids[0, -prompt.question_tokens :]) == fact
    before = tokenizer(text[: text.index(fact)], add_special_tokens=False)["input_ids"]
    assert len(before) <= depth * length + 1
    assert text[: text.index(fact)].removeprefix("<s>").endswith("\n\n") or len(before) <= 1


def test_prompt_refuses(tokenizer):
    with pytest.raises(ValueError, match="depth"):
        needle_prompt(tokenizer, 512, 1.5)
    with pytest.raises(RheoError, match="too few"):
        needle_prompt(tokenizer, 10_000_000, 0.5)
    with pytest.raises(RheoError, match="no room"):
        needle_prompt(tokenizer, 20, 0.5)


def test_found_looks_at_the_beginning():
    prompt = NeedlePrompt(ids=torch.zeros(1, 1), answer="84894", question_tokens=1)
    assert prompt.found(" 84894.\n\n") and prompt.found("84894")
    assert not prompt.found(" 84899.") and not prompt.found(" not 84894")


# ---- the demo


def test_wrong_answer_fails(model_dir, capsys):
    assert run_demo(model_dir) == 1
    shown = capsys.readouterr()
    assert "the answer is wrong: the text says 84894" in shown.err
    assert "hit rate" in shown.out and "prompt tokens" in shown.out and "640" in shown.out


def test_right_answer_passes(model_dir, capsys, monkeypatch):
    monkeypatch.setattr(NeedlePrompt, "found", lambda self, text: True)
    assert run_demo(model_dir) == 0
    shown = capsys.readouterr()
    assert "The answer is right" in shown.out and "The access code of vault Zephyr-9 is" in shown.out
    assert "wrong" not in shown.err


def test_a_budget_that_holds_everything_fails(model_dir, capsys, monkeypatch):
    monkeypatch.setattr(NeedlePrompt, "found", lambda self, text: True)
    assert run_demo(model_dir, "selection.token_budget=1024") == 1
    assert "0 blocks evicted, 0 loaded again" in capsys.readouterr().err


@pytest.mark.parametrize(("evicted", "missed"), [(0, 3), (3, 0), (0, 0)])
def test_problems(evicted, missed):
    stats = SimpleNamespace(evicted_blocks=evicted, miss_blocks=missed)
    assert len(demo.problems_of(True, "1", stats)) == 1
    assert len(demo.problems_of(False, "1", stats)) == 2
    assert demo.problems_of(True, "1", SimpleNamespace(evicted_blocks=1, miss_blocks=1)) == []


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *argv])


def test_sizes_and_overrides():
    context, config = demo.demo_config(arguments())
    assert (context, config.selection.token_budget, config.cache.capacity_ratio) == (8192, 2048, 1.5)
    assert config.cache.device_memory == "floor"
    context, config = demo.demo_config(arguments("--short"))
    assert context == 2048 and config.selection.token_budget < 1024
    context, config = demo.demo_config(arguments("--short", "--context", "4096", "--budget", "1024"))
    assert (context, config.selection.token_budget) == (4096, 1024)
    _, config = demo.demo_config(arguments("selection.token_budget=256"))
    assert config.selection.token_budget == 256


def test_refusals_are_one_line(model_dir, capsys):
    assert run_demo(model_dir, "--depth", "2") == 2
    assert run_demo(model_dir, "--context", "2045") == 2
    assert main(["demo", "--model", "./nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("rheo: ") for line in errors if line.startswith("rheo")] == [True] * 3
    assert any("2048 positions" in line for line in errors)
    assert any("no model directory ./nowhere" in line for line in errors)


# ---- on the packaged recall model


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    """Neither Gemma's packages nor what was made of them before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, loader._PACKAGE, None)


def test_native_answers_where_gemma_cannot_be_had(nothing_installed, capsys):
    """No model is named: one line says which one runs, and how to have the other; the answers can be read."""
    assert main(["demo", "--short", "--context", "1024", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    notes = [line for line in shown.err.splitlines() if line.startswith("rheo demo: ")]
    assert len(notes) == 1 and "native" in notes[0] and "pip install 'rheo-offload[demo]'" in notes[0]
    answers = [line for line in shown.out.splitlines() if " -> " in line]
    assert len(answers) > 20 and sum(line.endswith("]  right") for line in answers) >= 0.95 * len(answers)
    assert all(line.startswith("  ? n") for line in answers)
    assert f"of {len(answers)} answers are right" in shown.out and "hit rate" in shown.out
    assert "Blocks were evicted and loaded again" in shown.out


def test_gemma_by_its_name_is_not_replaced(nothing_installed, capsys):
    assert main(["demo", "--short", "--model", "gemma3-270m"]) == 2
    assert "rheo-offload[demo]" in capsys.readouterr().err


def run_native(*more):
    return main(["demo", "--model", "native", "--device", "cpu", "--context", "1024", *more])


def test_the_words_of_a_model_decide_not_its_name(model_dir, tmp_path, capsys, monkeypatch):
    """A directory `native` may hold a model of language, and one of another name a model of recall."""
    shutil.copytree(loader.NATIVE_DIR, tmp_path / "mine")
    shutil.copytree(model_dir, tmp_path / "native")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--model", "mine", "--device", "cpu", "--context", "1024"]) == 0
    assert "answers are right" in capsys.readouterr().out
    assert run_demo("native") == 1
    assert "the answer is wrong: the text says" in capsys.readouterr().err


def test_native_fails_on_wrong_answers(capsys, monkeypatch):
    """Every twentieth answer may be wrong, more not; what would have been right is shown."""
    monkeypatch.setattr(demo_native, "nothing_moved", lambda stats: [])
    ask = demo_native.ask

    def spoilt(model, ids, layout):
        for i, (question, answer) in enumerate(ask(model, ids, layout)):
            yield question, answer if i % 8 else answer[::-1]

    monkeypatch.setattr(demo_native, "ask", spoilt)
    assert run_native() == 1
    shown = capsys.readouterr()
    assert "fewer than 95%" in shown.err
    wrong = [line for line in shown.out.splitlines() if " -> ]" in line]
    assert wrong and all("wrong: it is " in line and line.endswith(" ]") for line in wrong)


def test_native_fails_where_no_block_moves(capsys):
    assert run_native("--budget", "1024") == 1
    assert "0 blocks evicted, 0 loaded again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--depth", "0.5"), "--depth has no effect on native"),
        (("--max-new-tokens", "32"), "--max-new-tokens has no effect on native"),
        (("--context", "40000"), "32768 positions"),
    ],
)
def test_native_refuses(capsys, more, reason):
    assert run_native(*more) == 2
    assert reason in capsys.readouterr().err


def test_native_sizes_and_overrides():
    def config_of(*argv):
        return demo_native.native_config(arguments("--model", "native", *argv))

    context, config = config_of()
    assert (context, config.selection.method, config.selection.token_budget) == (8192, "nosa", 512)
    assert (config.cache.block_size, config.cache.device_memory) == (32, "floor")
    context, config = config_of("--short", "--budget", "256", "cache.capacity_ratio=2")
    assert (context, config.selection.token_budget, config.cache.capacity_ratio) == (2048, 256, 2)
    _, config = config_of("--config", "streaming")
    assert (config.selection.method, config.selection.token_budget) == ("streaming", 512)
