"""The victim rule is the same in the three homes, ties and forbidden slots included."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from csrc_free_kernels.cpu import victims as cpu
from csrc_free_kernels.gpu import victims as gpu
from csrc_free_kernels.reference.victims import victims
from tests.helpers.homes import DEVICE

BASE, SINKS, TAIL, STEP = 3, 1, 11, 9


@triton.jit
def probe_kernel(
    block_in,
    last_used,
    args,
    mask_out,
    at_once_out,
    oldest_out,
    id_range,
    TILE: tl.constexpr,
    ALL: tl.constexpr,
):
    base, count, step = tl.load(args), tl.load(args + 1), tl.load(args + 2)
    tail, sinks, num = tl.load(args + 3), tl.load(args + 4), tl.load(args + 5)
    limit = gpu.victim_threshold(block_in, last_used, base, count, step, tail, sinks, id_range, num, TILE)
    for i_start in range(0, count, TILE):
        b_key = gpu.victim_keys(block_in, last_used, base, count, step, tail, sinks, id_range, i_start, TILE)
        o_i = i_start + tl.arange(0, TILE)
        tl.store(mask_out + base + o_i, (b_key <= limit).to(tl.int32), mask=o_i < count)
    b_key = gpu.victim_keys(block_in, last_used, base, count, step, tail, sinks, id_range, 0, ALL)
    o_i = tl.arange(0, ALL)
    if num > 0:
        m_first = gpu.first_victims(b_key, num, ALL)
        tl.store(at_once_out + base + o_i, m_first.to(tl.int32), mask=o_i < count)
    tl.store(oldest_out, gpu.oldest_slot(block_in, last_used, base, count, step, tail, sinks, id_range, TILE))


def tables(count: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_in` and `last_used` of `count` slots from BASE on; the slots around them belong to others."""
    block_in = torch.full((BASE + count + 5,), -1, dtype=torch.int32)
    last_used = torch.zeros_like(block_in)
    own = torch.randperm(max(count, TAIL + 1))[:count].to(torch.int32)
    last_used[BASE : BASE + count] = torch.randint(0, STEP + 1, (count,)).int()
    if kind == "free":
        own[torch.rand(count) < 0.4] = -1
    if kind == "ties":
        last_used[BASE : BASE + count] = 4
    if kind == "stuck":
        last_used[BASE : BASE + count] = STEP
    block_in[BASE : BASE + count] = own
    return block_in, last_used


CASES = [
    pytest.param(5, kind, num, id=f"{kind}-5-{num}")
    for kind in ("resident", "free", "ties")
    for num in (0, 1, 3, 9)
] + [
    pytest.param(37, "free", 7, id="several-tiles"),
    pytest.param(37, "free", 30, id="free-and-resident"),
    pytest.param(37, "ties", 16, id="ties-over-tiles"),
    pytest.param(12, "stuck", 4, id="nobody-may-go"),
    pytest.param(0, "resident", 2, id="owns-nothing"),
    *[
        pytest.param(300, kind, num, id=f"{kind}-300-{num}")
        for kind in ("free", "ties")
        for num in (2, 50, 170)
    ],
]


@pytest.mark.parametrize(("count", "kind", "num"), CASES)
def test_same_victims(count, kind, num):
    block_in, last_used = tables(count, kind)
    rule = (BASE, count, STEP, TAIL, SINKS)
    truth = victims(block_in, last_used, *rule, num)
    first = victims(block_in, last_used, *rule, 1)
    oldest = int(first[0]) if len(first) else -1

    out = np.full(max(num, 1), -77, np.int64)
    found = cpu.victims(block_in.numpy(), last_used.numpy(), *rule, num, out)
    assert out[:found].tolist() == truth.tolist()
    assert cpu.oldest_slot(block_in.numpy(), last_used.numpy(), *rule) == oldest

    mask, at_once = (torch.zeros(len(block_in), dtype=torch.int32, device=DEVICE) for _ in range(2))
    got = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    args = torch.tensor([*rule, num], dtype=torch.int32, device=DEVICE)
    id_range = triton.next_power_of_2(max(len(block_in), TAIL + 1))
    tables_in = (block_in.to(DEVICE), last_used.to(DEVICE))
    probe_kernel[(1,)](*tables_in, args, mask, at_once, got, id_range, TILE=16, ALL=512)
    assert at_once.nonzero().flatten().tolist() == truth.tolist()
    assert mask.nonzero().flatten().tolist() == truth.tolist()
    assert got.tolist() == [oldest]


def test_order():
    """Slots 3 to 9: free, block 7 used in step 2, sink 0, 5 in step 2, tail, 6 in this step, 2 in step 1."""
    block_in = torch.tensor([-1, -1, -1, -1, 7, 0, 5, TAIL, 6, 2], dtype=torch.int32)
    last_used = torch.tensor([0, 0, 0, STEP, 2, 0, 2, 0, STEP, 1], dtype=torch.int32)
    picked = [victims(block_in, last_used, 3, 7, STEP, TAIL, SINKS, num).tolist() for num in (1, 2, 3, 4, 7)]
    assert picked == [[3], [3, 9], [3, 6, 9], [3, 4, 6, 9], [3, 4, 6, 9]]
