"""The `rheo` command: verbs, exit codes, one line per error, overrides anywhere."""

import subprocess
import sys

import pytest

import rheo_offload
from rheo_offload.cli import generate, main
from rheo_offload.errors import ConfigError, RheoError, UnsupportedModelError

GENERATE = ["generate", "--model", "m", "--prompt", "p"]


def replace_run(monkeypatch: pytest.MonkeyPatch, run) -> None:
    """Let the verb `generate` do something else."""
    monkeypatch.setattr(generate, "run", run)


def test_overrides_may_stand_anywhere_after_the_verb(monkeypatch: pytest.MonkeyPatch):
    seen = []
    replace_run(monkeypatch, lambda args: seen.append((args.overrides, args.chat, args.verbose)) or 0)
    assert (
        main.main(["generate", "a.b=1", "--model", "m", "c.d=2", "--prompt", "x.y=z", "--chat", "e.f=3"]) == 0
    )
    assert main.main([*GENERATE, "-v"]) == 0
    assert seen == [(["a.b=1", "c.d=2", "e.f=3"], True, False), ([], False, True)]


@pytest.mark.parametrize(
    "argv",
    [
        [*GENERATE, "--unknown"],
        [*GENERATE, "--unknown=3"],
        ["generate", "a.b=1", "--model", "m", "--prompt", "p", "stray"],
        ["doctor", "a.b=1"],
        ["generate", "--model", "m"],
        [*GENERATE, "--prompt-file", "f"],
        [*GENERATE, "--max-new-tokens", "-1"],
        [*GENERATE, "--max-new-tokens", "x"],
        [*GENERATE, "--decode-tail", "0"],
        ["nothing"],
        [],
    ],
)
def test_what_the_parser_does_not_know_is_refused(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    replace_run(monkeypatch, lambda args: 0)
    with pytest.raises(SystemExit) as refusal:
        main.main(argv)
    assert refusal.value.code == 2
    assert "usage: rheo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RheoError("too\n  long"), "rheo: too long"),
        (ConfigError("a.b must be c"), "rheo: a.b must be c"),
        (UnsupportedModelError(["one", "two"]), "rheo: this model cannot be offloaded: one; two"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    error: RheoError, line: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    def run(args):
        raise error

    replace_run(monkeypatch, run)
    assert main.main(GENERATE) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", line + "\n")


def test_a_bug_is_not_dressed_up_as_a_user_error(monkeypatch: pytest.MonkeyPatch):
    def run(args):
        raise ValueError("a bug")

    replace_run(monkeypatch, run)
    with pytest.raises(ValueError, match="a bug"):
        main.main(GENERATE)


def test_ctrl_c_exits_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    replace_run(monkeypatch, run)
    assert main.main(GENERATE) == 130
    assert capsys.readouterr().err == "rheo: interrupted\n"


def test_every_verb_has_help(capsys):
    for verb in ("demo", "doctor", "generate", "plan"):
        with pytest.raises(SystemExit) as done:
            main.main([verb, "--help"])
        assert done.value.code == 0
        assert "--verbose" in capsys.readouterr().out


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "rheo_offload", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"rheo {rheo_offload.__version__}\n")
