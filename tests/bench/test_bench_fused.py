"""The fused suite: rows of both subjects, a gate that can fail, and the candidate's products."""

from dataclasses import replace

import pytest
import torch

from bench import few_rows
from bench import fused as suite
from bench.__main__ import main
from bench.few_rows import few_rows_linear
from bench.fused import Fused, FusedFew, run_fused
from bench.schema import Row, read_rows
from bench.shapes import quick_config, random_model
from bench.timing import Rates
from tests.helpers.homes import DEVICE, poison
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerance import assert_close

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


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows(rows, dtype):
    """Channels and width that fill no block; the rows are a view of a wider buffer."""
    x, weight = torch.randn(rows, 208).to(dtype)[:, :200], torch.randn(40, 200).to(dtype)
    out = poison(rows, 40, dtype=dtype, device=DEVICE)
    few_rows_linear(x.to(DEVICE), weight.to(DEVICE), out, CONFIG)
    truth = x.double() @ weight.double().T
    assert_close(out, truth, x @ weight.T, dtype)
    before = out.clone()
    few_rows_linear(x.to(DEVICE), weight.to(DEVICE), out, CONFIG, add=True)
    assert_close(out, truth + before.cpu(), before.cpu() + x @ weight.T, dtype)


def test_the_candidate_takes_the_products_of_a_fused_step(monkeypatch):
    """Every product of a step of two rows goes through the candidate: none of torch's is left, the logits agree."""
    model = tiny_model("llama", device=DEVICE)
    done = []
    monkeypatch.setattr(
        few_rows, "few_rows_linear", lambda *a, **kw: (done.append(a[1].shape), few_rows_linear(*a, **kw))
    )
    subject = FusedFew(model, {})
    subject.start(torch.tensor([[5], [7]], device=DEVICE), fill="random", max_length=1)
    with torch.inference_mode():
        own = subject.forward(subject.ids, subject.positions)
        shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2} | {(128, 64), (192, 64)}
        subject.configs = dict.fromkeys(shapes, CONFIG)
        got = subject.forward(subject.ids, subject.positions)
    assert len(done) == 2 * 4 + 1
    assert torch.allclose(got, own, atol=1e-4)


def test_best_configurations():
    """Only where the candidate beats torch, and only of the rows that are right."""
    base = Row(suite="fused", case_id="", metric="time", unit="ms")
    rows = [
        replace(base, case_id=f"m-1-qkv-few-{shape}", baseline=name, p50=ms, status=status)
        for shape, name, ms, status in (
            ("96x64", "torch", 3.0, "ok"),
            ("96x64", "few-16x64x4x3", 2.0, "ok"),
            ("96x64", "few-32x64x4x3", 1.5, "ok"),
            ("96x64", "few-64x64x4x3", 1.0, "wrong"),
            ("64x64", "torch", 1.0, "ok"),
            ("64x64", "few-16x64x4x3", 2.0, "ok"),
        )
    ]
    assert suite._best(rows) == {(96, 64): (32, 64, 4, 3)}


def test_more_rows_are_refused():
    with pytest.raises(ValueError, match="17 rows"):
        few_rows_linear(torch.zeros(17, 16), torch.zeros(16, 16), torch.zeros(17, 16), CONFIG)


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
