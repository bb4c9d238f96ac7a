"""The kernels suite and its tuner, on the CPU and on shapes that take no time."""

import json

import torch

from bench.__main__ import main
from bench.kernels import TIMED, Step, shape_of
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


def test_the_tuner_writes_a_table(tmp_path):
    before = list(launch.entries())
    assert main(["kernels", "--tune", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "launch_table.json").read_text())
    assert {e["op"] for e in table if e["arch"] == 0} == {"attend", "attend_splits", "decide"}
    assert launch.entries() == before
