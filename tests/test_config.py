"""The configuration refuses what it does not know, by name, and resolves every auto in one place."""

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import yaml

from rheo_offload.config import GROUPS, CacheConfig, RheoConfig, SelectionConfig, packaged_names, resolve_auto
from rheo_offload.config_checks import parse_bytes
from rheo_offload.errors import ConfigError
from rheo_offload.eval.setups import PACKAGED_AS
from rheo_offload.selection.policy import METHODS, make_policy, make_selector

ROOT = Path(__file__).parents[1]
KEYS = [f"{name}.{f.name}" for name, group in GROUPS.items() for f in dataclasses.fields(group)]


def test_defaults_are_the_documented_ones():
    config = RheoConfig()
    assert (config.cache.block_size, config.cache.device_memory, config.cache.capacity_ratio) == (
        32,
        "auto",
        1.5,
    )
    selection = config.selection
    assert (selection.method, selection.token_budget, selection.sink_blocks) == ("mean_key", "auto", 1)
    assert (selection.query_agnostic_share, selection.heat_decay, selection.dense_layers) == (0.5, 0.98, ())
    assert config.prefetch.overlap and config.prefill.chunk_tokens == 2048 and config.audit.every == 256


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache.block_sze=64", "unknown config key 'cache.block_sze'; did you mean 'cache.block_size'?"),
        ("cach.block_size=64", "unknown config key 'cach'; did you mean 'cache'?"),
        ("cache.token_budget=64", "did you mean 'selection.token_budget'?"),
        ("cache.block_size.x=2", "unknown config key 'cache.block_size.x'"),
        ("cache.block_size=48", "cache.block_size must be a power of two, 16 to 256, not 48"),
        ("cache.block_size=8", "cache.block_size"),
        ("cache.block_size=512", "cache.block_size"),
        ("cache.block_size=64.0", "cache.block_size must be an integer, not 64.0"),
        ("cache.block_size=true", "cache.block_size must be an integer, not True"),
        ("cache.device_memory=8Gib", "cache.device_memory must be auto, floor or a size: '8Gib'"),
        (
            "cache.device_memory=0",
            "cache.device_memory must be auto, floor or a size: a size must be positive",
        ),
        ("cache.host_memory=floor", "cache.host_memory must be auto or a size"),
        ("cache.host_memory=null", "cache.host_memory must be an integer or text, not None"),
        ("cache.capacity_ratio=true", "cache.capacity_ratio must be a number, not True"),
        ("cache.capacity_ratio=big", "cache.capacity_ratio must be a number, not 'big'"),
        ("cache.capacity_ratio=0.9", "cache.capacity_ratio must be a number >= 1.0, not 0.9"),
        ("cache.capacity_ratio=.inf", "cache.capacity_ratio"),
        (
            "selection.method=qest",
            "selection.method must be one of full, streaming, mean_key, infllm_v2, quest",
        ),
        ("selection.token_budget=big", "selection.token_budget must be an integer or auto, not 'big'"),
        ("selection.token_budget=0", "selection.token_budget"),
        ("selection.sink_blocks=-1", "selection.sink_blocks must be at least 0, not -1"),
        ("selection.recent_blocks=0", "selection.recent_blocks must be at least 1, or auto, not 0"),
        ("selection.query_agnostic_share=1.5", "selection.query_agnostic_share must be between 0 and 1"),
        ("selection.heat_decay=.nan", "selection.heat_decay must be between 0 and 1"),
        ("selection.dense_layers=[0,a]", "selection.dense_layers must be a list, each item an integer"),
        ("selection.dense_layers=[1,1]", "selection.dense_layers must be layer indices >= 0, each once"),
        ("selection.params=3", "selection.params must be a group of keys"),
        ("prefetch.overlap=1", "prefetch.overlap must be true or false, not 1"),
        ("prefill.chunk_tokens=0", "prefill.chunk_tokens"),
        (
            "execution.kernels=cuda",
            "execution.kernels must be one of auto, triton, numba, reference, not 'cuda'",
        ),
        ("audit.every=-1", "audit.every"),
        ("audit.every", "override 'audit.every' must have the form group.key=value"),
        ("every=1", "override 'every=1' must have the form group.key=value"),
        ("selection.params={a", "is not a YAML value"),
    ],
)
def test_a_bad_value_is_refused_by_name(override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RheoConfig().with_overrides([override])


@pytest.mark.parametrize("values", [{"cache": 3}, {"cache": [1]}])
def test_a_group_that_is_no_group_is_refused(values: dict):
    with pytest.raises(ConfigError, match="cache must be a group of keys"):
        RheoConfig.from_dict(values)


def test_constructors_check_like_the_loader():
    with pytest.raises(ConfigError, match=r"cache\.block_size"):
        CacheConfig(block_size=65)
    with pytest.raises(ConfigError, match="cache must be a CacheConfig"):
        RheoConfig(cache={"block_size": 64})


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"token_budget": 64}, 128),
        ({"token_budget": 511, "recent_blocks": 7}, 512),
        ({"token_budget": 256, "sink_blocks": 4}, 320),
    ],
)
def test_a_budget_below_the_forced_blocks_is_refused_and_the_next_one_up_is_taken(values: dict, needed: int):
    with pytest.raises(ConfigError, match=f"selection.token_budget .* at least {needed}"):
        RheoConfig.from_dict({"cache": {"block_size": 64}, "selection": values})
    RheoConfig.from_dict({"cache": {"block_size": 64}, "selection": values | {"token_budget": needed}})


def test_an_auto_budget_below_the_forced_blocks_is_refused_when_resolved():
    config = RheoConfig(selection=SelectionConfig(sink_blocks=80))
    with pytest.raises(ConfigError, match="selection.token_budget of 2048"):
        resolve_auto(config, context_len_tokens=1000, device_type="cpu")


def test_overrides_apply_in_order_and_leave_the_original_alone():
    config = RheoConfig()
    changed = config.with_overrides(
        [
            "selection.token_budget=1024",
            "selection.token_budget=512",
            "selection.dense_layers=[0, 3]",
            "selection.params.inner.gate=0.5",
            "cache.device_memory=1.5GiB",
            "cache.capacity_ratio=2",
        ]
    )
    assert changed.selection.token_budget == 512
    assert changed.selection.dense_layers == (0, 3)
    assert changed.selection.params == {"inner": {"gate": 0.5}}
    assert changed.cache.device_memory == "1.5GiB" and changed.cache.capacity_ratio == 2
    assert config == RheoConfig()


def test_dict_and_yaml_round_trip(tmp_path: Path):
    config = RheoConfig().with_overrides(
        ["selection.dense_layers=[1]", "selection.params.a=1", "cache.host_memory=2GB"]
    )
    assert RheoConfig.from_dict(config.to_dict()) == config
    file = tmp_path / "c.yaml"
    file.write_text(config.to_yaml())
    assert RheoConfig.from_yaml(file) == config
    config.to_dict()["selection"]["params"]["a"] = 2
    assert config.selection.params == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold groups of keys"),
        ("cache: {", "is not YAML"),
        ("cache: 1", "cache must be a group"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        RheoConfig.from_yaml(file)


def test_a_missing_file_names_the_packaged_ones():
    with pytest.raises(ConfigError, match="cannot read config 'nowhere.yaml'.*default.*quest"):
        RheoConfig.from_yaml("nowhere.yaml")


def test_an_empty_group_and_an_empty_file_keep_the_defaults(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("cache:\n")
    assert RheoConfig.from_yaml(file) == RheoConfig()
    file.write_text("")
    assert RheoConfig.from_yaml(file) == RheoConfig()


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("20GB", 20 * 10**9),
        (7, 7),
        ("7", 7),
        ("7B", 7),
    ],
)
def test_sizes_parse(text: int | str, size_bytes: int):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", -1, 0, True, "8gib", "8 GiBB", "1e9"])
def test_what_is_no_size_is_refused(text: int | str):
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("context", "device", "expected"),
    [
        (32 * 1024 - 1, "cuda", ("auto", 2048, 16, "triton")),
        (32 * 1024, "cuda", ("auto", 4096, 32, "triton")),
        (1, "cpu", ("floor", 2048, 16, "numba")),
    ],
)
def test_auto_is_resolved_into_a_new_config_and_logged(context, device, expected, caplog):
    config = RheoConfig()
    with caplog.at_level(logging.INFO, "rheo_offload"):
        resolved = resolve_auto(config, context_len_tokens=context, device_type=device)
    selection = resolved.selection
    assert (
        resolved.cache.device_memory,
        selection.token_budget,
        selection.recent_blocks,
        resolved.execution.kernels,
    ) == expected
    assert resolved.cache.host_memory == "auto"
    assert config == RheoConfig()
    logged = [record.getMessage().split(":")[0] for record in caplog.records]
    floor = ["cache.device_memory"] if device == "cpu" else []
    assert logged == [*floor, "selection.token_budget", "selection.recent_blocks", "execution.kernels"]


def test_what_was_set_is_not_resolved_again(caplog):
    values = ["selection.token_budget=512", "selection.recent_blocks=3", "execution.kernels=reference"]
    config = RheoConfig().with_overrides([*values, "cache.device_memory=1MiB", "cache.host_memory=2KiB"])
    with caplog.at_level(logging.INFO, "rheo_offload"):
        resolved = resolve_auto(config, context_len_tokens=100_000, device_type="cpu")
    assert (resolved.selection, resolved.execution) == (config.selection, config.execution)
    assert (resolved.cache.device_memory, resolved.cache.host_memory) == (2**20, 2048)
    assert not caplog.records
    assert resolve_auto(resolved, context_len_tokens=1, device_type="cuda") == resolved


@pytest.mark.parametrize(("context", "device"), [(0, "cpu"), (10, "mps")])
def test_resolve_refuses_nonsense(context: int, device: str):
    with pytest.raises(ValueError, match=f"{context}.*{device}"):
        resolve_auto(RheoConfig(), context_len_tokens=context, device_type=device)


@pytest.mark.parametrize("name", packaged_names())
def test_a_packaged_file_says_what_it_is_for_and_comments_every_key(name: str):
    file = ROOT / "configs" / f"{name}.yaml"
    assert file.resolve() == ROOT / "rheo_offload" / "configs" / f"{name}.yaml"
    text = file.read_text()
    head = text.split("\n\n")[0]
    assert (
        head.startswith("# ")
        and "rheo generate --model MODEL" in head
        and f"--config configs/{name}.yaml" in head
    )
    values = yaml.safe_load(text)
    assert [f"{group}.{key}" for group, keys in values.items() for key in keys] == KEYS
    key_lines = [line for line in text.splitlines() if re.match(r"  \w+:", line)]
    assert all(re.search(r"  # \w", line) for line in key_lines)
    assert RheoConfig.from_yaml(name) == RheoConfig.from_yaml(file)


def test_the_packaged_set_is_complete_and_the_default_is_the_default():
    names = [
        "arkvale", "default", "dense", "dma", "duo", "h2o", "hisa", "infllm_v2", "lserve", "mass", "moa", "moba",
        "nosa", "nsa_select", "power", "quest", "seer_r", "snapkv", "ssa", "streaming", "token_select", "tova",
    ]  # fmt: skip
    assert packaged_names() == names
    assert RheoConfig.from_yaml("default") == RheoConfig()
    assert RheoConfig.from_yaml("dense").selection.method == "full"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_a_packaged_file_that_names_it(method: str):
    config = RheoConfig.from_yaml(PACKAGED_AS.get(method, method))
    assert config.selection.method == method
    selector = make_selector(method, config.selection.params, block_size=config.cache.block_size)
    plain = resolve_auto(config, context_len_tokens=4096, device_type="cpu").selection
    make_policy(
        selector=selector, block_budget=plain.token_budget // config.cache.block_size,
        sink_blocks=plain.sink_blocks, recent_blocks=plain.recent_blocks,
        query_agnostic_share=plain.query_agnostic_share, heat_decay=plain.heat_decay,
    )  # fmt: skip


@pytest.mark.parametrize(("budget", "limit"), [("threshold", 0.01), ("mass", 0.9), ("margin", 4.0)])
def test_a_rule_of_the_budget_leaves_nothing_to_raise(budget: str, limit: float):
    selection = {"budget": budget, "budget_limit": limit}
    with pytest.raises(ConfigError, match="raise_below.*set audit.raise_below=0, or selection.budget=fixed"):
        RheoConfig.from_dict({"selection": selection, "audit": {"raise_below": 0.9}})
    RheoConfig.from_dict({"selection": selection})


def test_yaml_reads_off_as_a_truth_value_and_we_read_it_back():
    config = RheoConfig().with_overrides(["execution.graph=off", "execution.fused=on"])
    assert config.execution.graph == "off" and config.execution.fused == "on"
    with pytest.raises(ConfigError, match="execution.graph"):
        RheoConfig().with_overrides(["execution.graph=on"])
