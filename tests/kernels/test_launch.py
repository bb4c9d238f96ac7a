"""The launch table: what it says, what counts where it says nothing, and the table that is packaged."""

import json

import pytest
import torch

from csrc_free_kernels import launch

CPU = torch.device("cpu")


@pytest.fixture
def table():
    """An empty table that a test may fill; what was there comes back."""
    before = list(launch.entries())
    launch.replace([])
    yield
    launch.replace(before)


def test_the_next_larger_number_of_heads_counts(table):
    for heads, warps in ((8, 1), (64, 2), (512, 4)):
        launch.put("attend", CPU, heads, {"dim": 128}, {"num_warps": warps})
    said = {heads: launch.launch_of("attend", CPU, heads, dim=128) for heads in (1, 8, 9, 64, 65, 4000)}
    assert [use["num_warps"] for use in said.values()] == [1, 1, 2, 2, 4, 4]


def test_features_and_op_must_match(table):
    launch.put("attend", CPU, 8, {"dim": 128}, {"num_warps": 1})
    assert launch.launch_of("attend", CPU, 8, dim=64) == {}
    assert launch.launch_of("attend", CPU, 8) == {}
    assert launch.launch_of("decide", CPU, 8, dim=128) == {}
    launch.put("attend", CPU, 8, {"dim": 128}, {"num_warps": 2})
    assert launch.launch_of("attend", CPU, 8, dim=128) == {"num_warps": 2}
    assert len(launch.entries()) == 1


def test_a_candidate_counts_only_inside(table):
    launch.put("decide", CPU, 8, {}, {"num_warps": 1})
    with pytest.raises(KeyError), launch.candidate("decide", CPU, 8, {}, {"num_warps": 2}):
        assert launch.launch_of("decide", CPU, 8) == {"num_warps": 2}
        raise KeyError
    assert launch.launch_of("decide", CPU, 8) == {"num_warps": 1}


def test_splits(table):
    threads = torch.get_num_threads()
    assert launch.attend_splits(1, 64, CPU) == min(threads, launch.MAX_SPLITS)
    launch.put("attend_splits", CPU, 64, {}, {"programs": 512})
    assert [launch.attend_splits(heads, 64, CPU) for heads in (8, 16, 60, 64, 512)] == [32, 32, 9, 8, 1]
    assert launch.attend_splits(64, 3, CPU) == 3


def test_late_parts():
    """One a block of 32 KiB, several small blocks together, never more than 64."""
    assert [launch.late_parts(blocks, 32768) for blocks in (1, 64, 65, 500)] == [1, 64, 33, 63]
    assert [launch.late_parts(256, size) for size in (8192, 2048)] == [64, 16]


def test_the_packaged_table_is_well_formed():
    """Known names, one entry a call, and what an op understands."""
    known = {
        "attend": ({"dim", "block_size", "itemsize"}, {"num_warps", "num_stages", "tokens"}),
        "attend_fetch": (set(), {"fetchers"}),
        "attend_splits": (set(), {"programs"}),
        "decide": ({"blocks"}, {"num_warps", "programs"}),
        "linear_few": ({"itemsize", "k", "n"}, {"max_rows", "block_n", "block_k", "num_warps", "num_stages"}),
    }
    table = json.loads(launch.TABLE.read_text())
    calls = [(e["op"], e["arch"], e["heads"], tuple(sorted(e["features"].items()))) for e in table]
    assert len(set(calls)) == len(calls)
    for entry in table:
        features, use = known[entry["op"]]
        assert set(entry) == {"op", "arch", "heads", "features", "use"}
        assert set(entry["features"]) == features and set(entry["use"]) == use
