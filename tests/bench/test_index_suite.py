"""The replay of the index of two levels, on attention made up so that the answer is known."""

import pytest
import torch

from bench.index_suite import replay
from rheo_offload.calibration.capture import Sample
from rheo_offload.calibration.score import WARM_QUERIES
from rheo_offload.selection.index import Index, groups_to_open
from rheo_offload.types import Policy

BLOCKS, SIZE, HEADS, DIM = 128, 8, 2, 16
POLICY = Policy(
    block_budget=9, sink_blocks=1, recent_blocks=2, query_blocks=3, agnostic_blocks=3, heat_decay=0.9
)


def sample(mean_keys=None, steps=WARM_QUERIES + 4):
    gen = torch.Generator().manual_seed(0)
    mean_keys = torch.randn(BLOCKS, HEADS, DIM, generator=gen) if mean_keys is None else mean_keys
    q = torch.randn(HEADS, 2, steps, DIM, generator=gen)
    logits = torch.einsum("hgtd,nhd->thgn", q, mean_keys)
    positions = torch.arange(BLOCKS * SIZE - steps, BLOCKS * SIZE)
    nothing = torch.zeros(0)
    return Sample(
        positions=positions, q=q, q_raw=q, mean_keys=mean_keys, pooled=nothing, values=nothing,
        mass=logits.softmax(-1).mean(2), peak=nothing, block_size=SIZE, softmax_scale=1.0,
    )  # fmt: skip


def test_all_groups_open_is_the_flat_ranking():
    found = replay(sample(), POLICY, groups_to_open(POLICY, BLOCKS, Index(group_blocks=4, keep=1.0)))
    assert found.best == found.same == found.opened == 1 and found.mass == found.mass_flat


def test_few_groups_find_less():
    found = replay(sample(), POLICY, groups_to_open(POLICY, BLOCKS, Index(group_blocks=4, keep=0.05)))
    assert found.opened < 0.5 and found.best < 1 and found.same < 1 and found.mass < found.mass_flat


@pytest.mark.parametrize("size", [4, 16])
def test_groups_of_equal_keys_are_found(size):
    """The bound is exact where the mean keys of a group are one: the best blocks lie in the best groups."""
    gen = torch.Generator().manual_seed(1)
    keys = torch.randn(BLOCKS // size, HEADS, DIM, generator=gen).repeat_interleave(size, 0)
    groups = groups_to_open(POLICY, BLOCKS, Index(group_blocks=size, keep=0.2))
    one = sample(keys)
    one.q = one.q[:, :1].expand(
        -1, 2, -1, -1
    )  # over two query heads the mean of the scores is not their largest
    assert replay(one, POLICY, groups).best == 1
