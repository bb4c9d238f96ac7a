"""`rheo generate` from the command line to the text: against the stock model, and every refusal."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rheo_offload.cli import generate
from rheo_offload.cli.main import main

PROMPT = (
    "The quick brown fox jumps over the lazy dog. " * 5
)  # 225 bytes, 226 tokens: two blocks of 64 and a tail
COMMON = ["--device", "cpu", "--dtype", "float32"]


def rheo(*argv: object) -> int:
    return main(["generate", *map(str, argv), *COMMON])


def stock_ids(model_dir: Path, prompt: str, new_tokens: int, **kwargs: bool) -> list[int]:
    """What transformers alone generates greedily, in fp32; `kwargs` are the tokenizer's."""
    ids = AutoTokenizer.from_pretrained(model_dir)(prompt, return_tensors="pt", **kwargs)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def stock_text(model_dir: Path, prompt: str, new_tokens: int, **kwargs: bool) -> str:
    """The same as text."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return tokenizer.decode(stock_ids(model_dir, prompt, new_tokens, **kwargs), skip_special_tokens=True)


def test_text_goes_to_stdout_and_figures_to_stderr(model_dir: Path, capsys):
    assert rheo("--model", model_dir, "--prompt", PROMPT, "--max-new-tokens", 12) == 0
    out, err = capsys.readouterr()
    assert out == stock_text(model_dir, PROMPT, 12) + "\n"
    assert "new tokens" in err and "hit rate" in err and "12" in err


def test_json_is_one_record_and_nothing_else_on_stdout(model_dir: Path, tmp_path: Path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    assert (
        rheo("--model", model_dir, "--prompt-file", file, "--max-new-tokens", 5, "--json", "audit.every=1")
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    [result] = record["results"]
    assert result["text"] == stock_text(model_dir, PROMPT, 5)
    assert (result["prompt_tokens"], result["new_tokens"], result["finish_reason"]) == (226, 5, "length")
    assert record["interrupted"] is False
    assert record["stats"]["prompt_tokens"] == 226 and record["stats"]["audited_steps"] > 0


def test_a_batch_of_prompts_equals_each_alone(model_dir: Path, tmp_path: Path, capsys):
    prompts = ["x", PROMPT, PROMPT[:63]]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts) + "\n\n")
    assert rheo("--model", model_dir, "--prompts-file", file, "--max-new-tokens", 6, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert [r["text"] for r in record["results"]] == [stock_text(model_dir, p, 6) for p in prompts]
    assert [r["prompt_tokens"] for r in record["results"]] == [2, 226, 64]
    assert rheo("--model", model_dir, "--prompts-file", file, "--max-new-tokens", 2) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [
        f"--- prompt {i} of 3 (length)" for i in (1, 2, 3)
    ]


def test_a_queue_of_prompts_equals_one_batch(model_dir: Path, tmp_path: Path, capsys):
    """Five prompts through two rows: the others join as rows become free."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": PROMPT[: 20 + 40 * i]}) for i in range(5)))
    common = ["--model", model_dir, "--prompts-file", file, "--max-new-tokens", 6, "--json"]
    records = []
    for more in ([], ["--max-batch", 2]):
        assert rheo(*common, *more) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[0]["results"] == records[1]["results"]
    assert records[1]["stats"]["new_tokens"] == 30 and records[1]["stats"]["prompt_tokens"] > 400
    assert rheo(*common, "--max-batch", 2, "--repetition-penalty", 1.2) == 2
    assert "--repetition-penalty does not work together with --max-batch" in capsys.readouterr().err


def test_a_queue_reads_the_models_generation_config(model_dir: Path, tmp_path: Path, capsys):
    """Its end token ends rows and its top-k of one makes draws greedy, as in one batch; what cannot be done is said."""
    own = tmp_path / "model"
    shutil.copytree(model_dir, own)
    end = stock_ids(model_dir, PROMPT, 4)[-1]
    GenerationConfig(do_sample=True, eos_token_id=end, top_k=1, pad_token_id=0).save_pretrained(own)
    common = ["--model", own, "--prompt", PROMPT, "--max-new-tokens", 9, "--temperature", 1.5, "--json"]
    records = []
    for more in ([], ["--max-batch", 2]):
        assert rheo(*common, *more) == 0
        records.append(json.loads(capsys.readouterr().out)["results"])
    assert records[0] == records[1] and records[0][0]["finish_reason"] == "stop"
    GenerationConfig(repetition_penalty=1.3).save_pretrained(own)
    assert rheo(*common, "--max-batch", 2) == 2
    assert "no RepetitionPenaltyLogitsProcessor" in capsys.readouterr().err
    assert rheo(*common, "--max-batch", 2, "--repetition-penalty", 1) == 0


def test_a_queue_of_one_prompt_prints_its_text(model_dir: Path, capsys):
    assert rheo("--model", model_dir, "--prompt", PROMPT, "--max-new-tokens", 12, "--max-batch", 4) == 0
    assert capsys.readouterr().out == stock_text(model_dir, PROMPT, 12) + "\n"


def test_a_prompt_from_stdin_and_a_small_budget(model_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    small = [
        "selection.token_budget=32",
        "cache.block_size=16",
        "cache.device_memory=floor",
        "selection.recent_blocks=1",
    ]
    assert (
        rheo(
            "--model",
            model_dir,
            "--prompt",
            "-",
            "--max-new-tokens",
            8,
            "--decode-tail",
            20,
            "--json",
            *small,
        )
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["stats"]["block_budget"] == 2
    assert record["stats"]["decode_steps"] >= 20
    assert record["results"][0]["new_tokens"] == 8


@pytest.mark.parametrize("prompt", [PROMPT, "a"])
def test_no_new_tokens_reads_the_prompt_only(model_dir: Path, capsys, prompt: str):
    assert rheo("--model", model_dir, "--prompt", prompt, "--max-new-tokens", 0, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["results"][0]["text"], record["results"][0]["new_tokens"]) == ("", 0)


def test_chat_and_system_go_through_the_template(model_dir: Path, capsys):
    assert rheo("--model", model_dir, "--prompt", "hello", "--system", "be brief", "--max-new-tokens", 4) == 0
    text = "<s>[system] be brief\n[user] hello\n[assistant] "
    assert capsys.readouterr().out == stock_text(model_dir, text, 4, add_special_tokens=False) + "\n"


def test_sampling_repeats_with_its_seed_and_differs_between_seeds(model_dir: Path, capsys):
    def sampled(seed: int) -> str:
        flags = [
            "--temperature",
            1.5,
            "--top-p",
            0.95,
            "--top-k",
            200,
            "--repetition-penalty",
            1.1,
            "--seed",
            seed,
        ]
        assert rheo("--model", model_dir, "--prompt", PROMPT, "--max-new-tokens", 6, "--json", *flags) == 0
        return json.loads(capsys.readouterr().out)["results"][0]["text"]

    first = sampled(1)
    assert sampled(1) == first
    assert sampled(2) != first


def test_ctrl_c_keeps_what_was_generated(model_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Interrupted at the fourth token: three are printed, with the figures; exit code 130."""
    put, calls = generate.Recorder.put, []

    def interrupting(self, value):
        calls.append(1)
        if len(calls) == 5:  # the prompt and three tokens came before
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr(generate.Recorder, "put", interrupting)
    assert rheo("--model", model_dir, "--prompt", PROMPT, "--max-new-tokens", 9) == 130
    out, err = capsys.readouterr()
    assert out == stock_text(model_dir, PROMPT, 3) + "\n"
    assert "interrupted" in err and "hit rate" in err
    calls.clear()
    assert rheo("--model", model_dir, "--prompt", PROMPT, "--max-new-tokens", 9, "--json") == 130
    record = json.loads(capsys.readouterr().out)
    assert record["interrupted"] and record["results"][0]["finish_reason"] == "interrupted"
    assert record["results"][0]["new_tokens"] == 3


def test_ctrl_c_before_anything_ran_has_no_figures(model_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    def interrupting(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate", interrupting)
    assert rheo("--model", model_dir, "--prompt", PROMPT, "--json") == 130
    assert json.loads(capsys.readouterr().out)["stats"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt-file", "nowhere.txt"], "cannot read 'nowhere.txt': No such file"),
        (["--prompts-file", "nowhere.jsonl"], "cannot read 'nowhere.jsonl'"),
        (["--prompt", "a" * 500, "--max-new-tokens", "20"], "= 521 is 9 more than the model's 512 positions"),
        (["--prompt", "abc", "--decode-tail", "5"], "--decode-tail 5 exceeds the shortest prompt (4 tokens)"),
        (["--prompt", "a", "cache.block_sze=64"], "unknown config key 'cache.block_sze'; did you mean"),
        (["--prompt", "a", "--config", "nowhere.yaml"], "cannot read config 'nowhere.yaml'"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature must be at least 0"),
        (["--prompt", "a", "--temperature", "0", "--top-k", "3"], "--temperature 0 is greedy"),
        (["--prompt", "a", "--top-p", "1.2"], "--top-p must be above 0 and at most 1"),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty must be above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(model_dir: Path, capsys, flags: list[str], message: str):
    assert rheo("--model", model_dir, *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert message in err.splitlines()[-1]


def test_allow_longer_exceeds_the_positions(model_dir: Path, capsys):
    flags = ["--max-new-tokens", 3, "--allow-longer", "--json"]
    assert rheo("--model", model_dir, "--prompt", "a" * 510, *flags) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["new_tokens"] == 3


@pytest.mark.parametrize("line", ["[1]", '{"text": "a"}', '{"prompt": 3}', "not json"])
def test_a_bad_line_of_prompts_is_named(model_dir: Path, tmp_path: Path, capsys, line: str):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    assert rheo("--model", model_dir, "--prompts-file", file) == 2
    assert f"{file}:2: " in capsys.readouterr().err


def test_unreadable_prompts_are_refused(model_dir: Path, tmp_path: Path, capsys):
    binary, empty = tmp_path / "binary", tmp_path / "empty.jsonl"
    binary.write_bytes(b"ab\xff\xfe")
    empty.write_text("\n")
    assert rheo("--model", model_dir, "--prompt-file", binary) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
    assert rheo("--model", model_dir, "--prompts-file", empty) == 2
    assert "holds no or an empty prompt" in capsys.readouterr().err


def test_a_missing_model_is_refused(tmp_path: Path, capsys):
    assert rheo("--model", tmp_path / "nowhere", "--prompt", "a") == 2
    assert "nowhere" in capsys.readouterr().err


def test_rows_are_cut_at_their_end_token(model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    stopped = generate.result([0, 5], [*ids, 1, 7, 7], tokenizer, {1}, interrupted=True)
    assert (stopped.text, stopped.new_tokens, stopped.finish_reason) == ("abc", 4, "stop")
