"""The probe measures what is there, says it in both formats, and its arithmetic is right."""

import argparse
import json

import pytest
import torch

from rheo_offload import __version__
from rheo_offload.cli import doctor
from rheo_offload.metrics import probe

TINY = probe.Sizes(copy_bytes=1 << 20, gather_bytes=1 << 18, pin_bytes=1 << 22, read_bytes=1 << 22, runs=2)
CPU = torch.device("cpu")
GIB = 1 << 30


def run(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(probe, "QUICK", TINY)
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", "--quick", *argv])
    return args.run(args)


def figure(name: str, value: float, unit: str = "GB/s", **kwargs) -> probe.Figure:
    return probe.Figure(name=name, value=value, unit=unit, runs=3, **kwargs)


def host(budget_bytes: int, locked: int | None = None) -> dict:
    return {
        "cores": 4,
        "free_bytes": budget_bytes,
        "auto_budget_bytes": budget_bytes,
        "locked_limit_bytes": locked,
    }


def test_json_is_one_object_and_progress_stays_on_stderr(monkeypatch, capsys):
    assert run(monkeypatch, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found) == {"versions", "device", "host", "figures", "verdict"}
    assert found["versions"]["rheo-offload"] == __version__
    # the wheel's metadata may leave out the build ("+cu130")
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["host"]["cores"] >= 1
    assert found["host"]["auto_budget_bytes"] <= 0.8 * found["host"]["total_bytes"]
    for each in found["figures"]:
        assert each["value"] > 0 and each["unit"] in ("GB/s", "s/GiB") and each["runs"] >= 1
    assert "measuring" in err and "measuring" not in out


def test_the_table_names_every_figure_with_its_unit(monkeypatch, capsys):
    assert run(monkeypatch) == 0
    out = capsys.readouterr().out
    names = (
        ("cpu_read",) if not torch.cuda.is_available() else ("link_h2d", "link_d2h", "gather_32k", "cpu_read")
    )
    for name in names:
        (line,) = [line for line in out.splitlines() if line.startswith(name)]
        assert "GB/s" in line and "median of 2" in line
    assert "s/GiB" in out


def test_without_a_gpu_the_report_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(monkeypatch)
    out = capsys.readouterr().out
    assert "No GPU" in out
    assert "link_h2d" not in out and "gather" not in out


@pytest.mark.parametrize("kernels", ["numba", "reference"])
def test_the_gather_measurement_moves_blocks_of_the_size_it_names(kernels):
    found = probe.gather_bandwidth(CPU, 4096, TINY, link=figure("link_h2d", 50.0), kernels=kernels)
    assert (found.name, found.unit, found.limit) == ("gather_4k", "GB/s", 50.0)
    assert found.value > 0


def test_a_gather_that_moves_too_little_is_no_measurement(monkeypatch):
    lazy = type("Ops", (), {"gather": staticmethod(lambda *a: None)})
    monkeypatch.setattr(probe, "kernels_for", lambda *a: lazy)
    with pytest.raises(RuntimeError, match="moved 0 blocks"):
        probe.gather_bandwidth(CPU, 4096, TINY)


def test_link_measurement_copies_both_ways():
    h2d, d2h = probe.link_bandwidth(CPU, TINY)
    assert (h2d.name, d2h.name) == ("link_h2d", "link_d2h") and min(h2d.value, d2h.value) > 0


def test_the_median_is_taken_over_the_runs(monkeypatch):
    clock = iter([0.0, 1.0, 0.0, 9.0, 0.0, 2.0])

    class Event:
        def record(self, _):
            self.at = next(clock)

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(probe, "event", lambda *a, **k: Event())
    seen = []
    assert probe.median_s(CPU, seen.append, 3) == 2.0
    assert seen == [0, 0, 1, 2], "one warm-up, then the runs"


def test_reading_sums_every_word_once():
    words = torch.arange(1000, dtype=torch.int64).numpy().view("uint64")
    for parts in (1, 3, 7):
        assert int(probe._add_up(words, parts)) == 999 * 500


def test_sizes_shrink_with_the_free_memory():
    small = probe.Sizes().within(GIB)
    assert max(small.copy_bytes, small.gather_bytes * 8, small.pin_bytes, small.read_bytes) <= GIB // 4
    assert probe.Sizes().within(1 << 50) == probe.Sizes()


def test_verdict_arithmetic():
    figures = [
        figure("link_h2d", 53.6870912),
        figure("gather_32k", 53.6870912),
        figure("cpu_read", 107.3741824),
    ]
    text = "\n".join(probe.verdict(figures, host(128 * GIB)))
    assert (
        "10,000 tokens/s with 1 % misses and 2,000 with 5 %" in text
    )  # 53.69 GB/s over 512 MiB = 100 a token
    assert "2.0 times" in text
    assert "1,048,576 tokens (128.0 GiB" in text
    assert "locked" not in text and "80 % is usual" not in text


def test_verdict_names_what_is_wrong():
    figures = [figure("link_h2d", 50.0), figure("gather_32k", 20.0), figure("cpu_read", 80.0)]
    text = "\n".join(probe.verdict(figures, host(64 * GIB, locked=8 << 20)))
    assert "40%" in text and "8 MiB (`ulimit -l`)" in text


def test_table_of_a_gpu_shows_limits():
    found = {
        "versions": {"torch": "1"},
        "device": {"name": "X", "compute_capability": "9.0", "total_bytes": 80 * GIB, "free_bytes": 70 * GIB},
        "host": {"cores": 4, "free_bytes": GIB, "total_bytes": 2 * GIB, "locked_limit_bytes": 8 << 20},
        "figures": [
            {
                "name": "gather_4k",
                "value": 48.0,
                "unit": "GB/s",
                "runs": 9,
                "limit": 50.0,
                "limit_is": "one large copy",
            },
        ],
        "verdict": ["fine"],
    }
    text = doctor.table(found)
    assert "70 GiB free of 80 GiB" in text and "limit 8 MiB" in text
    assert "48 GB/s (median of 9; 96% of one large copy, 50)" in text


@pytest.mark.gpu
def test_everything_is_measured_on_a_gpu():
    names = {figure.name for figure in probe.measure(torch.device("cuda"), TINY)}
    assert names == {"link_h2d", "link_d2h", "gather_4k", "gather_16k", "gather_32k", "pin", "cpu_read"}
