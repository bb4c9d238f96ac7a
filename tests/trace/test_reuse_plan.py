"""From a recorded run to a plan of reuse: overlaps by hand, the best plan by brute force, the file, the command."""

import itertools
import json

import numpy as np
import pytest
import torch

from rheo_offload import offload, restore
from rheo_offload.cli.main import main
from rheo_offload.errors import TraceError
from rheo_offload.trace.file import NO_BLOCK, Trace
from rheo_offload.trace.recorder import record
from rheo_offload.trace.reuse import overlaps, plan_reuse
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import greedy, prompt, sparse_config

META = dict(
    block_size=16, block_budget=5, sink_blocks=1, recent_blocks=2, query_blocks=2, agnostic_blocks=0,
    heat_decay=0.98, capacity=6, block_bytes=2048, layers=[2, 4, 5], model="m", config_hash="0" * 16,
)  # fmt: skip


def hand_made(ids, lens, **meta):
    ids = np.array(ids, dtype=np.uint16)  # [L, R, H, T, S]
    layers, rows, heads, steps, _ = ids.shape
    start = np.zeros((layers, rows, heads, 3), np.uint16)
    misses = np.zeros((layers, rows, heads, steps), np.uint16)
    lens = np.array(lens, dtype=np.int32)
    return Trace(ids=ids, lens=lens, misses=misses, start_used=start, start_order=start, meta=META | meta)


def test_overlaps_count_what_was_chosen_and_nothing_forced():
    """Ten blocks, 0 forced at the start, 8 and 9 at the end; the second step fits the budget and says nothing."""
    first = [[0, 3, 4, 8, 9], [0, 1, 2, 3, 4]]
    second = [[0, 3, 5, 8, 9], [0, 1, 2, 3, 4]]
    third = [[0, 6, 8, 9, NO_BLOCK], [0, 1, 2, 3, 4]]
    trace = hand_made([[[first]], [[second]], [[third]]], [[155], [80]])
    assert overlaps(trace).tolist() == [[1, 0.5, 0], [0, 1, 0], [0, 0, 1]]
    alone = hand_made([[[first[1:]]], [[third[1:]]]], [[80]], layers=[0, 1])
    with pytest.raises(TraceError, match="held every row whole"):
        overlaps(alone)
    with pytest.raises(TraceError, match="reused selections already"):
        overlaps(hand_made([[[first]]], [[155], [80]], layers=[0], reuse_layers={"1": 0}))


def best_by_hand(overlap, least):
    """Every set of scoring layers: the fewest, then the most overlap."""
    count, found = len(overlap), []
    for scoring in itertools.product((False, True), repeat=count - 1):
        sources, plan = [0, *(i + 1 for i, s in enumerate(scoring) if s)], {}
        for j in range(count):
            source = max(i for i in sources if i <= j)
            if source != j:
                plan[j] = source
        if all(overlap[i, j] >= least for j, i in plan.items()):
            found.append((len(sources), -sum(overlap[i, j] for j, i in plan.items())))
    return min(found)


@pytest.mark.parametrize("least", [0.0, 0.4, 0.7, 0.9, 1.0])
def test_the_plan_is_the_best_one(least):
    rng = np.random.default_rng(3)
    for count in (1, 2, 5, 9):
        overlap = np.triu(rng.random((count, count)).round(1), 1) + np.eye(count)
        plan = plan_reuse(overlap, least)
        assert all(i < j and i not in plan and overlap[i, j] >= least for j, i in plan.items())
        found = count - len(plan), -sum(overlap[i, j] for j, i in plan.items())
        want = best_by_hand(overlap, least)
        assert found[0] == want[0] and found[1] == pytest.approx(want[1])


def test_from_a_run_to_a_run(tmp_path, capsys):
    """Record, plan with the command, and decode with the plan: its layers take their source's blocks."""
    model, ids = tiny_model("llama", device=DEVICE, num_hidden_layers=4), prompt()
    offload(model, sparse_config())
    with record(model) as recorder:
        greedy(model, ids, new=6)
    trace, file, out = recorder.trace(), tmp_path / "run.npz", tmp_path / "plan.json"
    trace.save(file)
    found = overlaps(trace)
    assert main(["trace", "plan", str(file), "--out", str(out), "--overlap", "0.3"]) == 0
    plan = json.loads(out.read_text())
    assert plan["config_hash"] == trace.meta["config_hash"] and plan["selecting_layers"] == 4
    assert {int(j): i for j, i in plan["layers"].items()} == plan_reuse(found, 0.3)
    assert f"{len(plan['layers'])} of 4 layers" in capsys.readouterr().out
    plan["layers"] = {"1": 0, "3": 2}
    out.write_text(json.dumps(plan))
    restore(model)
    offload(model, sparse_config().with_overrides([f"selection.reuse_layers={out}"]))
    with record(model) as recorder:
        greedy(model, ids, new=6)
    again = recorder.trace()
    assert (again.ids[1] == again.ids[0]).all() and (again.ids[3] == again.ids[2]).all()
    assert again.meta["reuse_layers"] == {"1": 0, "3": 2}
    assert torch.isfinite(torch.tensor(overlaps(trace))).all()


def test_a_share_out_of_range_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["trace", "plan", "x.npz", "--out", str(tmp_path / "p"), "--overlap", "1.5"])
