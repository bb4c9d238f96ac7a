"""Captured and eager steps under the same random schedule (on the CPU both are eager: then it tests the schedule)."""

import pytest

from bench.fuzz import fuzz
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import sparse_config

TIGHT = dict(cache={"capacity_ratio": 1.0}, selection={"query_agnostic_share": 0.25})


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_twins_agree(family):
    steps = 60 if DEVICE == "cpu" else 400
    report = fuzz(lambda: tiny_model(family, device=DEVICE), sparse_config(**TIGHT), steps=steps)
    assert report.ok, report
    assert report.events["admitted"] > 3 and report.tokens_compared > 100
    if DEVICE != "cpu":
        assert report.captures > 3 and report.events["tables grown"] > 0


def test_twins_agree_with_an_index_of_two_levels():
    """Rows move, leave and grow; captured steps open groups, and begin to when the table has grown."""
    steps = 60 if DEVICE == "cpu" else 400
    index = {"index": "two_level", "index_group": 4, "index_keep": 0.05, "query_agnostic_share": 0.0}
    config = sparse_config(**TIGHT | {"selection": index})
    report = fuzz(lambda: tiny_model("llama", device=DEVICE), config, steps=steps)
    assert report.ok, report
    assert report.events["admitted"] > 3 and report.tokens_compared > 100
