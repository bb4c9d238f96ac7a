"""The kernels suite and its tuner, on the CPU and on shapes that take no time."""

import json

import torch

from bench.__main__ import main
from bench.kernels import INDEXED, TIMED, Shape, Step, shape_of
from bench.schema import read_rows
from csrc_free_kernels import launch


def test_every_op_is_timed(tmp_path):
    assert main(["kernels", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert [row["baseline"] for row in rows] == [*TIMED, *TIMED]
    assert all(row["p50"] > 0 and row["unit"] == "us" for row in rows)
    assert (tmp_path / "env.json").exists()


def test_the_timed_step_is_the_step_of_the_single_ops():
    """Nothing is missing, and the fused ops give what the single ones give."""
    step = Step(shape_of(2, 12, True), torch.device("cpu"))
    layer = step.layers[0]
    outs = []
    for run in (step.layer, step.layer_of_single_ops):
        step.out.fill_(torch.nan)
        run(layer)
        outs.append(step.out.clone())
        assert int((step.hits >= 0).sum()) == step.hits.numel() and not int(step.load_count)
    torch.testing.assert_close(*outs)


def test_the_index_of_two_levels_is_there_where_it_leaves_blocks_out():
    """What is selected lies in open groups, and less is read."""
    assert Step(shape_of(2, 12, True), torch.device("cpu")).opened is None
    shape = Shape(
        rows=2,
        blocks=400,
        heads=1,
        group=2,
        dim=16,
        block_size=16,
        budget=8,
        capacity=12,
        dtype=torch.float32,
    )
    step = Step(shape, torch.device("cpu"))
    assert step.floors()["open_groups"] < step.floors()["open_and_decide"] < step.floors()["decide"]
    for name in INDEXED:
        getattr(step, name)(step.layers[0])
    size = step.opened.groups.group_blocks
    for row, opened in zip(step.selected, step.opened.lists, strict=True):
        assert set((row // size).flatten().tolist()) <= set(opened.flatten().tolist())


def test_the_tuner_writes_a_table(tmp_path):
    before = list(launch.entries())
    assert main(["kernels", "--tune", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "launch_table.json").read_text())
    assert {e["op"] for e in table if e["arch"] == 0} == {"attend", "attend_splits", "decide"}
    assert launch.entries() == before
