"""`bench fuzz` from the command line: a report with what was done, and an exit code."""

import json

from bench.__main__ import main


def test_quick_run_writes_a_report(tmp_path):
    assert main(["fuzz", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "fuzz.json").read_text())
    assert report["steps"] == 60 and report["differences"] == []
    assert report["evicted_blocks"] > 0 and report["events"]["admitted"] > 0
    assert report["environment"]["command"].startswith("python -m bench fuzz")
