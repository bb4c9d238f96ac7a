"""`gather`: the load list, host blocks to pool slots."""

import pytest
import torch

from csrc_free_kernels.gpu.gather import gather as triton_gather
from csrc_free_kernels.reference.gather import gather as reference
from tests.helpers.homes import homes
from tests.helpers.pools import assert_same_bits, make_pools

# (Hkv, D, C, seq_lens, dtype, loads, trailer)
CASES = {
    "nothing": (2, 64, 8, [20], torch.float32, 0, 0),
    "one": (1, 64, 8, [8], torch.float32, 1, 0),
    "some": (2, 80, 8, [33, 17], torch.bfloat16, 7, 0),
    "more-than-programs": (2, 64, 8, [80, 64], torch.float16, 21, 0),
    "trailer": (1, 96, 8, [25], torch.bfloat16, 3, 6),
    "real-size": (2, 128, 64, [256], torch.bfloat16, 5, 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("op", "device"), homes("gather"))
def test_gather(op, device, case):
    heads, dim, size, seq_lens, dtype, loads, trailer = CASES[case]
    pools = make_pools(heads, dim, size, seq_lens, slots=12, dtype=dtype, trailer=trailer)
    max_loads = loads + 3
    pages = pools.host_table[pools.host_table > 0].long()
    src = (pages[:, None] * heads + torch.arange(heads)).flatten()
    src = torch.cat((src[torch.randperm(len(src))[:loads]], torch.full((3,), -77))).int()
    dst = torch.cat((torch.randperm(len(pools.pool) - 1)[:loads] + 1, torch.full((3,), -77))).int()
    assert len(src) == len(dst) == max_loads

    def outcome(op, device):
        p = pools.copy(device)
        count = torch.tensor([loads], dtype=torch.int32, device=device)
        total = torch.tensor([2**40], dtype=torch.int64, device=device)
        op(src.to(device), dst.to(device), count, p.host_blocks, p.pool_blocks, total)
        assert total.item() == 2**40 + loads and count.item() == loads
        return p.pool

    expected = outcome(reference, "cpu")
    assert_same_bits(outcome(op, device), expected, "pool")
    for page_head, slot in zip(src[:loads].tolist(), dst[:loads].tolist(), strict=True):
        assert_same_bits(expected[slot], pools.host_blocks[page_head // heads, page_head % heads], "block")


@pytest.mark.gpu
def test_replays_in_a_graph():
    """A captured gather reads the list and its length anew on every replay."""
    pools = make_pools(2, 128, 64, [512], slots=10, dtype=torch.bfloat16).copy("cuda")
    src, dst = (torch.zeros(8, dtype=torch.int32, device="cuda") for _ in range(2))
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    total = torch.zeros(1, dtype=torch.int64, device="cuda")
    load = (src, dst, count, pools.host_blocks, pools.pool_blocks, total)
    triton_gather(*load)  # compiled outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_gather(*load)
    pages = pools.host_table[0, :8].cpu()
    for loads in (5, 0, 8):
        pools.pool.fill_(float("nan"))
        src.copy_(pages * 2 + 1)
        dst.copy_(torch.randperm(len(pools.pool) - 1)[:8] + 1)
        count.fill_(loads)
        graph.replay()
        expected = torch.full_like(pools.pool, float("nan"), device="cpu")
        expected[dst[:loads].long().cpu()] = pools.host_blocks[pages[:loads].long(), 1]
        assert_same_bits(pools.pool, expected, "pool")
    assert total.item() == 13
