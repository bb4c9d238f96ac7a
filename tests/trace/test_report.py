"""The report of a trace: figures that show what was counted, and a page that needs nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rheo_offload.errors import TraceError
from rheo_offload.trace import report
from rheo_offload.trace.analysis import Analysis, analyse
from rheo_offload.trace.forecast import Machine
from rheo_offload.trace.report import FIGURES, REPORT, selection_map, write_report
from tests.trace.conftest import made


def analysed(**meta: object) -> Analysis:
    trace = made(["12", "13", "12", "45"], **meta)
    return analyse(trace, ratios=[1.0, 2.0], machine=Machine(num_layers=1, num_kv_heads=1), batches=[1, 4])


class Page(HTMLParser):
    """Every address and cell of a page, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path):
    pytest.importorskip("matplotlib")
    analysis = analysed(model="<script>alert(1)</script>", stopped="another run began")
    written = write_report(analysis, tmp_path / "out" / "deep")
    assert [file.name for file in written] == [*(f"{name}.png" for name in FIGURES), REPORT]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in written[:-1])
    text = written[-1].read_text()
    page = Page(text)
    assert page.open == [] and len(page.addresses) == len(FIGURES)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|<script|@import|url\(", text)
    assert "another run began" in text and "&lt;script&gt;" in text
    for table in (analysis.hit_table(), analysis.link_table(), analysis.forecast_table()):
        assert {cell for row in table for cell in row} <= set(page.cells)
    assert {"block_budget", "config_hash"} <= set(page.cells)


def test_the_selection_map_counts_shares(monkeypatch):
    share = selection_map(made(["12", "13", "12", "45"]), 0)
    assert share.shape == (10, 4)
    assert share[0].tolist() == share[9].tolist() == [1, 1, 1, 1]
    assert share[1].tolist() == [1, 1, 1, 0] and share[7].sum() == 0
    monkeypatch.setattr(report, "COLUMNS", 3)
    np.testing.assert_array_equal(selection_map(made(["12", "13", "12", "45", "12"]), 0)[2], [0.5, 0.5, 1])


def test_without_matplotlib_or_a_place_it_says_so(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    pytest.importorskip("matplotlib")
    with pytest.raises(TraceError, match="cannot write to"):
        write_report(analysed(), tmp_path / "file" / "out")

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(report.importlib, "import_module", missing)
    with pytest.raises(TraceError, match=r"\[plot\] extra"):
        write_report(analysed(), tmp_path / "out")


def test_tables_and_record_say_the_same():
    analysis = analysed()
    record = analysis.record()
    head, *rows = analysis.hit_table()
    assert head == ["policy", "1 x", "2 x"] and [row[0] for row in rows] == [
        "fifo", "lru", "lfu", "heat", "belady", "previous-layer", "perfect",
    ]  # fmt: skip
    lru = [found for found in record["replays"] if found["policy"] == "lru"]
    assert rows[1][1:] == [f"{r['hit_rate']:.2%} ({r['hit_rate_unforced']:.2%})" for r in lru]
    # 12 closed blocks, four of them the sink; 2 + 1 + 0 + 2 misses. The larger pool begins with 1, 2 and 3 besides.
    assert rows[1] == ["lru", "58.33% (37.50%)", "83.33% (75.00%)"]
    assert record["run"]["capacity"] == 5 and [f["capacity"] for f in record["forecasts"]] == [5, 5, 8, 8]
