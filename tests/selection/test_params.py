"""A method's own parameters: declared by it, checked by name, type, range and block size, refused elsewhere."""

import dataclasses
import re
from pathlib import Path

import pytest

from rheo_offload import RheoConfig, offload
from rheo_offload.config import packaged_names
from rheo_offload.errors import ConfigError
from rheo_offload.selection.policy import METHODS, make_selector
from tests.helpers.tiny_model import tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "selectors.md"
PUBLISHED = {  # block size, budget, sink, recent, share, method
    "moba": (256, 1536, 0, 1, 0.0, "moba"),
    "arkvale": (32, 4096, 2, 2, 0.0, "arkvale"),
    "lserve": (64, 4096, 0, 1, 0.0, "lserve"),
    "ssa": (16, 256, 1, 2, 0.0, "mean_key"),
}


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("mean_key", {"page_size": 16}, "selection.params: method 'mean_key' takes none, not page_size"),
        ("streaming", {"b": 1, "a": 1}, "selection.params: method 'streaming' takes none, not a, b"),
        (
            "quest",
            {"page_sze": 16},
            "method 'quest' has no 'selection.params.page_sze'; did you mean 'selection.params.page_size'?",
        ),
        ("arkvale", {"window": 3}, "no 'selection.params.window'; it takes digest, shared_by"),
        ("quest", {"page_size": "big"}, "selection.params.page_size must be an integer or block, not 'big'"),
        ("lserve", {"page_size": True}, "selection.params.page_size must be an integer or block, not True"),
        ("quest", {"page_size": 24}, "selection.params.page_size must be block, or a power of two"),
        ("quest", {"page_size": 2}, "power of two, 4 to cache.block_size (32), not 2"),
        ("lserve", {"page_size": 64}, "power of two, 4 to cache.block_size (32), not 64"),
        ("infllm_v2", {"window_stride": 24}, "window_stride must be a power of two, 4 to 64, not 24"),
        ("nosa", {"window_stride": 2}, "window_stride must be a power of two, 4 to 64, not 2"),
        ("moba", {"group_by": "sum"}, "selection.params.group_by must be one of max, mean, not 'sum'"),
        ("arkvale", {"digest": "sphere"}, "digest must be one of cuboid-mean, cuboid-max, centroid"),
        (
            "hisa",
            {"scorer": "full"},
            "scorer must be one of infllm_v2, lserve, mean_key, moba, quest, not 'full'",
        ),
        ("token_select", {"tokens": -1}, "selection.params.tokens must be at least 1, not -1"),
        ("arkvale", {"shared_by": ["layer"]}, "shared_by must be one of layer, kv_head, not ['layer']"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(method, params, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_selector(method, params, block_size=32)


@pytest.mark.parametrize(
    ("method", "params", "width"),
    [
        ("quest", {}, 2),
        ("quest", {"page_size": "block"}, 2),
        ("quest", {"page_size": 16}, 8),
        ("lserve", {}, 8),
        ("lserve", {"page_size": 64}, 2),
        ("moba", {"group_by": "mean"}, 1),
        ("arkvale", {}, 2),
        ("arkvale", {"digest": "centroid"}, 1),
        ("infllm_v2", {}, 4),
        ("infllm_v2", {"window_stride": 8}, 8),
        ("nsa_select", {"window_stride": 64}, 1),
        ("nosa", {"window_stride": 8}, 8),
        ("hisa", {}, 1),
        ("hisa", {"scorer": "lserve"}, 8),
        ("token_select", {"tokens": 3}, 1),
        ("h2o", {}, 0),
    ],
)
def test_parameters_decide_the_summary(method, params, width):
    assert make_selector(method, params, block_size=64).summary_width(64) == width


def test_offload_refuses_before_it_touches_the_model():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    for method, params in (("moba", {"page_size": 16}), ("quest", {"page_size": 128})):
        config = RheoConfig.from_dict({"selection": {"method": method, "params": params}})
        with pytest.raises(ConfigError, match=r"selection\.params"):
            offload(model, config)
        assert not hasattr(model, "rheo") and model.config._attn_implementation == before


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_files_make_their_method(name):
    config = RheoConfig.from_yaml(name)
    selection, size = config.selection, config.cache.block_size
    assert make_selector(selection.method, selection.params, block_size=size).name == selection.method
    if name in PUBLISHED:
        assert (
            size, selection.token_budget, selection.sink_blocks, selection.recent_blocks,
            selection.query_agnostic_share, selection.method,
        ) == PUBLISHED[name]  # fmt: skip


def test_the_table_of_the_docs_is_complete_and_its_bytes_are_right():
    """One row a method, with the bytes of its summary per token at D = 128, C = 64 in bf16."""
    rows = {}
    for line in DOCS.read_text().partition("## Rules")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells
    assert set(rows) == set(METHODS)
    for name, cells in rows.items():
        cls = METHODS[name]
        stored = re.search(r"\d+", cells[5])
        assert stored and int(stored[0]) == cls().summary_width(64) * 128 * 2 // 64, name
        taken = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        assert all(f"`{key}`" in cells[7] for key in taken) and bool(taken) == bool(cells[7]), name


def test_the_command_line_refuses_before_weights_are_read(tmp_path, capsys):
    from rheo_offload.cli.main import main

    nothing = str(tmp_path / "no-such-model")
    args = ["--context", "4096", "selection.method=quest", "selection.params.page=16"]
    assert main(["plan", "--model", nothing, *args]) != 0
    assert "did you mean 'selection.params.page_size'?" in capsys.readouterr().err
