"""Budgets that vary (threshold, mass, margin): through a run, what a mean of blocks shows, and what is refused."""

import re

import pytest
import torch

from rheo_offload import offload, restore
from rheo_offload.errors import ConfigError
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.model.test_families import batch, drop_before_every_step
from tests.test_end_to_end import greedy, prompt, sparse_config

RULES = {"threshold": ("mean_key", 0.1), "mass": ("infllm_v2", 0.5), "margin": ("quest", 2.0)}
LOOSE = {"threshold": 1e-7, "mass": 1.0, "margin": float("inf")}


def ruled(budget, budget_blocks=8, limit=None, share=0.0, **selection):
    method, usual = RULES[budget]
    rule = {
        "budget": budget,
        "budget_limit": usual if limit is None else limit,
        "query_agnostic_share": share,
    }
    return sparse_config(method, budget_blocks, selection=rule | selection)


@pytest.fixture
def llama():
    return tiny_model("llama", device=DEVICE)


@pytest.mark.parametrize("budget", RULES)
def test_fewer_blocks_than_the_budget(llama, budget):
    """The mean of the blocks lies between the forced ones and the budget, and eviction changes speed only."""
    ids = prompt()
    offload(llama, ruled(budget))
    calm = greedy(llama, ids)
    stats = llama.rheo.stats()
    assert 3 < stats.selected_blocks_mean < 8 and "blocks" in stats.table()
    assert stats.evicted_blocks > 0 and 0 < stats.captured_mass_min < 1
    hook = drop_before_every_step(llama)
    assert torch.equal(greedy(llama, ids), calm)
    hook.remove()


@pytest.mark.parametrize("budget", RULES)
def test_a_limit_that_leaves_nothing_out_equals_stock(llama, budget):
    ids, mask = batch((150, 61, 7))
    expected = greedy(llama, ids, attention_mask=mask)
    offload(llama, ruled(budget, 12, LOOSE[budget] if budget != "threshold" else 1e-12))
    found = greedy(llama, ids, attention_mask=mask)
    if budget == "threshold":  # 1e-12 rounds to no share at all: whatever has a score
        assert llama.rheo.stats().selected_blocks_mean > 5
    assert torch.equal(found, expected)


def test_the_agnostic_share_is_added(llama):
    """A mass that the forced blocks reach alone: the hottest blocks fill their own share, and no more."""
    ids = prompt()
    means = {}
    for share in (0.0, 0.6):
        offload(llama, ruled("mass", 8, 1e-6, share))
        greedy(llama, ids)
        means[share] = llama.rheo.stats().selected_blocks_mean
        restore(llama)
    assert means[0.0] <= 4 and means[0.6] == pytest.approx(means[0.0] + 3, abs=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", RULES)
def test_captured_steps_are_the_eager_ones(llama, budget):
    ids = prompt(300)
    offload(llama, ruled(budget, share=0.5))
    captured = greedy(llama, ids, new=40)
    restore(llama)
    offload(llama, ruled(budget, share=0.5).with_overrides(["execution.graph=off"]))
    assert torch.equal(greedy(llama, ids, new=40), captured)


@pytest.mark.parametrize(
    ("method", "budget", "limit", "more", "message"),
    [
        ("quest", "mass", 0.9, {}, "'mass' does not go with method 'quest': its scores are logits"),
        ("moba", "threshold", 0.1, {}, "'threshold' does not go with method 'moba': its scores are logits"),
        ("mean_key", "margin", 4.0, {}, "'margin' does not go with method 'mean_key': its scores are shares"),
        ("streaming", "mass", 0.9, {}, "'mass' does not go with method 'streaming': it does not score"),
        ("power", "mass", 0.9, {}, "'mass' does not go with method 'power': it does not score"),
        (
            "hisa",
            "mass",
            0.9,
            {},
            "'mass' does not go with method 'hisa': it ranks blocks, or tokens of blocks",
        ),
        ("mean_key", "mass", 0.9, {"query_agnostic_share": 1.0}, "share of 1 leaves it nothing to choose"),
        ("mean_key", "mass", 0.0, {}, "selection.budget_limit must be above 0 and at most 1 for budget mass"),
        ("mean_key", "threshold", 1.5, {}, "selection.budget_limit must be above 0 and at most 1"),
        ("mean_key", "fixed", 0.5, {}, "selection.budget_limit must be 0 for budget fixed, not 0.5"),
        ("mean_key", "top", 0.5, {}, "selection.budget must be one of fixed, threshold, mass, margin"),
    ],
)
def test_a_rule_without_a_meaning_is_refused(method, budget, limit, more, message):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=re.escape(message)):
        offload(model, sparse_config(method, selection={"budget": budget, "budget_limit": limit} | more))
    assert not hasattr(model, "rheo")


def test_a_budget_of_forced_blocks_alone_is_refused(llama):
    offload(llama, ruled("mass", 3))
    with pytest.raises(
        ConfigError, match="holds|leaves method 'infllm_v2' none to choose beyond 1 sink, 2 recent"
    ):
        greedy(llama, prompt(60))
