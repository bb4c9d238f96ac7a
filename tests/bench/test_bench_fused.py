"""The fused suite: rows of both subjects, a gate that can fail, and the entries that follow from the products."""

from dataclasses import replace

import pytest
import torch

from bench import fused as suite
from bench.__main__ import main
from bench.few_rows import best_entries, entry, table_after
from bench.fused import Fused, FusedFew, run_fused
from bench.schema import Row, read_rows
from bench.shapes import quick_config, random_model
from bench.timing import Rates
from csrc_free_kernels import launch
from rheo_offload.model import fused as module
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model

CONFIG = (16, 64, 4, 3)


def test_quick_run(tmp_path):
    assert main(["fused", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert [(r["baseline"], r["batch"]) for r in rows] == [
        (name, batch) for batch in (1, 2) for name in ("no-attention", "no-attention-fused")
    ]
    assert all(r["metric"] == "step" and r["floor_ms"] > 0 and r["frac_of_floor"] > 0 for r in rows)


def test_a_wrong_fused_step_gets_no_time(monkeypatch):
    model = random_model(quick_config(), torch.device("cpu"), torch.float32)
    monkeypatch.setattr(
        suite.Fused,
        "forward",
        lambda self, ids, positions: super(suite.Fused, self).forward(ids + 1, positions),
    )
    rows: list[Row] = []
    run_fused(model, "quick", [1], 5, Rates(1e9, 1e9), rows.append)
    stock, ours = rows
    assert stock.status == "ok" and ours.status == "wrong" and ours.p50 is None


def test_the_op_takes_the_products_of_a_fused_step(monkeypatch):
    """With entries every product of a step of two rows is the op's, without them none; the logits agree."""
    done, kernels_for = [], module.kernels_for

    def spied(*args):
        ops = kernels_for(*args)
        own = ops.linear_few
        ops.linear_few = lambda *a, **kw: (done.append(a[1].shape), own(*a, **kw))
        return ops

    monkeypatch.setattr(module, "kernels_for", spied)
    model = tiny_model("llama", device=DEVICE)
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2} | {(128, 64), (192, 64)}
    entries = [entry(shape, CONFIG, 2, launch.arch_of(model.device), 4) for shape in shapes]
    subject, before = FusedFew(model, entries), list(launch.entries())
    subject.start(torch.tensor([[5], [7]], device=DEVICE), fill="random", max_length=1)
    with torch.inference_mode():
        got = subject.forward(subject.ids, subject.positions)
        assert len(done) == 2 * 4 + 1 and launch.entries() == before
        subject.entries = ()
        own = subject.forward(subject.ids, subject.positions)
    assert len(done) == 2 * 4 + 1
    assert torch.allclose(got, own, atol=1e-4)


def product_rows(*times):
    """Rows of products: shape, subject, rows, ms (None: it was wrong)."""
    base = Row(suite="fused", case_id="", metric="time", unit="ms", dtype="bfloat16")
    return [
        replace(
            base, case_id=f"m-m{rows}-qkv-{name}-{shape}", baseline=name, batch=rows, p50=ms,
            status="ok" if ms else "wrong",
        )
        for shape, name, rows, ms in times
    ]  # fmt: skip


ROWS = product_rows(
    ("96x64", "torch", 1, 3.0),
    ("96x64", "torch-add", 1, 3.1),
    ("96x64", "few-16x64x4x3", 1, 1.0),  # the fastest, but only with one row
    ("96x64", "few-32x64x4x3", 1, 2.0),
    ("96x64", "few-32x64x4x4", 1, 1.9),
    ("96x64", "few-64x64x4x3", 1, None),
    ("96x64", "torch", 16, 3.0),
    ("96x64", "few-16x64x4x3", 16, 3.0),
    ("96x64", "few-32x64x4x3", 16, 2.5),
    ("96x64", "few-32x64x4x4", 16, 2.5),
    ("96x64", "few-64x64x4x3", 16, 1.0),
    ("96x64", "torch", 64, 3.0),
    ("64x64", "torch", 1, 1.0),
    ("64x64", "few-16x64x4x3", 1, 0.999),  # no clear win
    ("64x32", "torch", 1, 2.0),
    ("64x32", "few-16x64x4x3", 1, 1.0),
    ("64x32", "torch", 16, 2.0),
    ("64x32", "few-16x64x4x3", 16, 2.0),
)


def test_best_entries():
    """The candidate that clearly wins up to the most rows, then the fastest, of those that are right."""
    assert best_entries(ROWS, torch.device("cpu")) == [
        entry((96, 64), (32, 64, 4, 4), 16, 0, 2),
        entry((64, 32), (16, 64, 4, 3), 1, 0, 2),
    ]
    assert best_entries([], torch.device("cpu")) == []


def test_the_table_forgets_what_no_longer_wins():
    """Other weights, dtypes and ops keep their entries."""
    lost = entry((64, 64), (16, 64, 4, 3), 16, 0, 2)
    kept = [entry((8, 8), (16, 64, 4, 3), 16, 0, 2), entry((64, 64), (16, 64, 4, 3), 16, 0, 4)]
    kept.append({"op": "attend", "arch": 0, "heads": 0, "features": {"dim": 8}, "use": {"num_warps": 1}})
    before = list(launch.entries())
    try:
        launch.replace([lost, *kept])
        assert table_after(ROWS, torch.device("cpu")) == kept + best_entries(ROWS, torch.device("cpu"))
        assert table_after([], torch.device("cpu")) == [lost, *kept]
    finally:
        launch.replace(before)


def test_tune_writes_a_table(tmp_path):
    """On the CPU there are no products: the table stays as it is."""
    args = ["fused", "--quick", "--tune", "--device", "cpu", "--out", str(tmp_path)]
    assert main(args) == 0
    assert (tmp_path / launch.TABLE.name).read_text() == launch.TABLE.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "granite", "phi3"])
def test_captured_equals_eager(family):
    """A captured fused step gives what the eager one gives, for the tokens it is replayed with."""
    subject = Fused(tiny_model(family, dtype=torch.bfloat16, device=DEVICE))
    first, second = (torch.randint(3, 97, (4, 1), device=DEVICE) for _ in range(2))
    subject.start(first.clone(), fill="random", max_length=1)
    with torch.inference_mode():
        expected = [subject.forward(ids, subject.positions) for ids in (first, second)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = subject.forward(subject.ids, subject.positions)
        for ids, truth in zip((second, first), expected[::-1], strict=True):
            subject.ids.copy_(ids)
            graph.replay()
            torch.testing.assert_close(out, truth)
