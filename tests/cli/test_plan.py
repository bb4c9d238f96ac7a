"""`rheo plan`: the sums, the verdict, and that what it calls the largest is the largest."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from rheo_offload.cli.main import main
from rheo_offload.cli.plan import largest
from rheo_offload.model.offload import DEVICE_RESERVE_BYTES

GIB, KIB = 1 << 30, 1 << 10
BLOCK = 2 * 64 * 16 * 2  # K and V of 64 tokens, D = 16, bf16


@pytest.fixture(scope="module")
def config_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights: 4 layers, 2 KV heads, D = 16."""
    directory = tmp_path_factory.mktemp("shape")
    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ).save_pretrained(directory)
    return directory / "config.json"


def plan(capsys, config: Path, *argv: object) -> tuple[int, dict]:
    size = "cache.block_size=64"  # the sums below are of such blocks
    code = main(["plan", "--model", str(config), "--json", "--dtype", "bfloat16", *map(str, argv), size])
    return code, json.loads(capsys.readouterr().out)


def test_the_sums_are_those_of_the_shapes(config_json: Path, capsys):
    code, record = plan(
        capsys,
        config_json,
        "--context",
        65536,
        "--batch",
        3,
        "--device-total",
        "8GiB",
        "cache.device_memory=floor",
    )
    assert code == 0 and record["fits"] and record["problems"] == []
    assert (record["token_budget"], record["block_budget"], record["max_blocks"]) == (4096, 64, 1024)
    assert record["capacity_blocks"] == 96  # 1.5 x the budget
    assert record["pool_bytes"] == 3 * 4 * 2 * 96 * BLOCK  # rows, layers, KV heads
    assert record["dense_kv_bytes"] == 3 * 4 * 2 * 1024 * BLOCK
    assert record["host_bytes"] >= record["dense_kv_bytes"]
    parameters = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(config_json)).num_parameters()
    assert record["weight_bytes"] == 2 * parameters  # tied embeddings once
    parts = ("pool", "ring", "summary", "table", "staging", "workspace", "weight", "reserve")
    assert record["device_bytes"] == sum(record[f"{part}_bytes"] for part in parts)


def test_the_index_of_two_levels_keeps_two_vectors_a_group(config_json: Path, capsys):
    arguments = ("--context", 65536, "--batch", 3, "--device-total", "8GiB", "cache.device_memory=floor")
    _, flat = plan(capsys, config_json, *arguments)
    _, record = plan(capsys, config_json, *arguments, "selection.index=two_level", "selection.index_group=32")
    more = record["summary_bytes"] - flat["summary_bytes"]
    assert more == 3 * 4 * 2 * (1024 // 32) * 2 * 16 * 2  # rows, layers, KV heads, groups, vectors, D, bf16
    assert record["device_bytes"] - flat["device_bytes"] == more
    assert (
        main(["plan", "--model", str(config_json), "--context", "9999", "selection.index=two_level",
              "selection.method=quest"]) == 2
    )  # fmt: skip
    assert "does not rank blocks by one mean key" in capsys.readouterr().err


def test_a_bias_per_token_is_counted(config_json: Path, capsys):
    """64 numbers behind K and V of every block, on both sides; their means of 16 tokens (fp32) on the device."""
    flags = ["--context", 65536, "--device-total", "8GiB", "cache.device_memory=floor"]
    records = [
        plan(capsys, config_json, *flags, f"selection.method={method}")[1]
        for method in ("infllm_v2", "nosa", "dma")
    ]
    plain, nosa, dma = records
    heads, pages = 4 * 2, 1024 + 1
    for record, units in ((nosa, 4), (dma, 64)):
        assert record["pool_bytes"] - plain["pool_bytes"] == heads * 96 * 64 * 2
        assert record["host_bytes"] - plain["host_bytes"] == heads * pages * 64 * 2
        keys = plain["summary_bytes"] if record is nosa else 0
        assert record["summary_bytes"] == keys + heads * pages * units * 4


def test_a_directory_and_its_config_json_are_the_same(config_json: Path, capsys):
    flags = ["--context", 4096, "--device-total", "8GiB", "cache.host_memory=1GiB"]
    assert plan(capsys, config_json.parent, *flags)[1] | {"model": ""} == plan(capsys, config_json, *flags)[
        1
    ] | {"model": ""}


def test_auto_fills_the_device_and_never_exceeds_it(config_json: Path, capsys):
    flags = ["--context", 131072, "--batch", 16, "cache.host_memory=64GiB"]
    floor = plan(capsys, config_json, *flags, "cache.device_memory=floor", "--device-total", "8GiB")[1]
    total = floor["device_bytes"] + 100 * floor["pool_bytes_per_capacity"]
    record = plan(capsys, config_json, *flags, "--device-total", total)[1]
    assert record["fits"]
    assert floor["capacity_blocks"] < record["capacity_blocks"] < 2048
    unused = total - record["device_bytes"]
    assert 0 <= unused < 2 * record["pool_bytes_per_capacity"]
    everything = plan(capsys, config_json, *flags, "--device-total", "64GiB")[1]
    assert everything["capacity_blocks"] == everything["max_blocks"] == 2048


def test_a_cap_in_bytes_limits_the_pool(config_json: Path, capsys):
    flags = ["--context", 131072, "--device-total", "8GiB"]
    slot = plan(capsys, config_json, *flags)[1]["pool_bytes_per_capacity"]
    capped = plan(capsys, config_json, *flags, f"cache.device_memory={70 * slot + 1}")
    assert (capped[0], capped[1]["capacity_blocks"]) == (0, 70)
    code, record = plan(capsys, config_json, *flags, f"cache.device_memory={60 * slot}")
    assert code == 1 and "cache.device_memory allows" in record["problems"][0]


@pytest.mark.parametrize(
    ("flags", "knob"),
    [
        (["--device-total", "1GiB"], "the weights alone do not fit"),
        (
            ["--device-total", DEVICE_RESERVE_BYTES + 1_000_000, "prefill.chunk_tokens=65536"],
            "prefill.chunk_tokens",
        ),
        (
            ["--device-total", DEVICE_RESERVE_BYTES + 3_000_000, "prefill.chunk_tokens=64", "--batch", 8],
            "lower --batch or selection.token_budget",
        ),
        (["--device-total", "8GiB", "cache.host_memory=1MiB"], "raise cache.host_memory"),
    ],
)
def test_what_does_not_fit_names_the_knob(config_json: Path, capsys, flags: list, knob: str):
    code, record = plan(capsys, config_json, "--context", 131072, *flags)
    assert code == 1 and not record["fits"]
    assert any(knob in problem for problem in record["problems"]), record["problems"]


def test_the_largest_fit_and_one_more_does_not(config_json: Path, capsys):
    flags = ["--device-total", 2 * GIB, "cache.host_memory=256MiB"]
    _, record = plan(capsys, config_json, "--context", 65536, *flags)
    rows, tokens = record["largest_batch"], record["largest_context_tokens"]
    assert rows >= 1 and tokens >= 65536
    for batch, context, code in [(rows, 65536, 0), (rows + 1, 65536, 1), (1, tokens, 0), (1, tokens + 64, 1)]:
        assert plan(capsys, config_json, "--context", context, "--batch", batch, *flags)[0] == code


@pytest.mark.parametrize("answer", [0, 1, 2, 63, 64, 99, 100])
def test_largest_finds_every_answer(answer: int):
    assert largest(lambda n: n <= answer, 100) == answer


def test_the_table_is_for_people(config_json: Path, capsys):
    flags = ["--model", str(config_json), "--context", "131072", "--device-total", "8GiB"]
    assert main(["plan", *flags, "cache.host_memory=1GiB"]) == 0
    out = capsys.readouterr().out
    assert "of 8.00 GiB" in out and "131,072 tokens x 1" in out and out.endswith("it fits\n")
    assert main(["plan", *flags, "cache.host_memory=1MiB"]) == 1
    assert "it does not fit: the host store" in capsys.readouterr().out


def test_refusals(config_json: Path, tmp_path: Path, capsys):
    GPT2Config(n_embd=48, n_head=4, n_layer=1, is_encoder_decoder=True).save_pretrained(tmp_path)
    for flags, message in [
        (["--model", str(tmp_path / "nowhere")], "cannot read the configuration"),
        (["--model", str(tmp_path)], "encoder-decoder"),
        (["--model", str(config_json), "--device-total", "80 gigs"], "--device-total"),
        (["--model", str(config_json), "selection.dense_layers=[99]"], "dense_layers names layers [99]"),
        (["--model", str(config_json), "selection.reuse_layers=none.json"], "cannot read 'none.json'"),
        (["--model", str(config_json), "selection.methd=quest"], "did you mean 'selection.method'?"),
    ]:
        assert main(["plan", "--context", "1000", *flags]) == 2
        assert message in capsys.readouterr().err
