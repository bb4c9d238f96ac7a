"""How large the pool gets, and what happens when the device has less than it said."""

import logging

import pytest
import torch

from rheo_offload import DeviceMemoryError, offload
from rheo_offload.cache.sizing import allocate_shrinking, capacity_floor
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import greedy, prompt, sparse_config

BLOCK_BYTES = 2 * 16 * 16 * 4  # keys and values of 16 tokens, head dim 16, fp32
PER_SLOT = 2 * 2 * BLOCK_BYTES  # two layers of two KV heads


def test_capacity_shrinks_until_it_fits(caplog):
    """The allocator refuses what is above 20 slots: capacity goes down to what fits, with a line saying so."""
    tried = []

    def allocate(capacity):
        tried.append(capacity)
        if capacity > 20:
            raise torch.OutOfMemoryError("no room")
        return capacity

    with caplog.at_level(logging.WARNING, "rheo_offload"):
        assert allocate_shrinking(allocate, 32, 9) <= 20
    assert tried == sorted(tried, reverse=True) and "no room for 32 slots" in caplog.text


def test_capacity_below_the_budget_is_refused():
    def allocate(capacity):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(DeviceMemoryError, match=r"9 slots .* lower selection.token_budget or the batch"):
        allocate_shrinking(allocate, 32, 9)


@pytest.mark.parametrize(("slots", "expected"), [(100, 20), (12, 12), (8, 8)])
def test_a_cap_in_bytes_sets_the_capacity(slots, expected, caplog):
    """300 + 20 tokens are 20 blocks a row; the budget of 6 needs 7 slots, and asks for 9 (ratio 1.5)."""
    model = offload(
        tiny_model("llama", device=DEVICE), sparse_config(cache={"device_memory": slots * PER_SLOT})
    )
    with caplog.at_level(logging.WARNING, "rheo_offload"):
        greedy(model, prompt(300), new=20)
    assert model.rheo.stats().capacity_blocks == expected
    assert ("memory is short" in caplog.text) == (slots < 9)


def test_a_cap_below_the_budget_is_refused_before_the_first_token():
    model = offload(tiny_model("llama", device=DEVICE), sparse_config(cache={"device_memory": 6 * PER_SLOT}))
    with pytest.raises(DeviceMemoryError, match=r"token_budget.*cache.device_memory"):
        greedy(model, prompt(300), new=20)


@pytest.mark.parametrize(
    ("budget", "blocks", "ratio", "slots"),
    [(64, 256, 1.5, 96), (64, 256, 1.0, 65), (64, 40, 1.5, 40), (1, 9, 1.0, 2)],
)
def test_capacity_floor(budget, blocks, ratio, slots):
    assert capacity_floor(budget, blocks, ratio) == slots
