"""`append_chunk`: every token to its host page, and to the pool where its block is resident."""

import pytest
import torch

from csrc_free_kernels.reference.append_chunk import append_chunk as reference
from tests.helpers.homes import homes
from tests.helpers.pools import assert_same, make_pools

# (Hkv, D, C, start, Q, dtype, make_pools options)
CASES = {
    "one-token": (1, 64, 8, [0], 1, torch.float32, {}),
    "exactly-one-block": (2, 64, 8, [0, 8], 8, torch.float32, {}),
    "ragged-padding": (2, 80, 8, [-3, 0, 5, -11, -15], 11, torch.bfloat16, {}),
    "several-tiles": (1, 96, 16, [7, -40], 70, torch.float16, {}),
    "nothing-resident": (1, 64, 8, [13], 9, torch.float32, {"resident": 0.0, "tail_resident": False}),
    "all-resident": (2, 64, 8, [13], 9, torch.float32, {"resident": 1.0, "slots": 9}),
    "real-size": (2, 128, 64, [100], 65, torch.bfloat16, {}),
    "trailer": (1, 64, 8, [4], 7, torch.float32, {"trailer": 16}),
}


@pytest.mark.parametrize(("op", "device"), homes("append_chunk"))
def test_one_number_a_token(op, device):
    """A bias per token behind K and V is stored as a value of one channel."""
    pools = make_pools(2, 64, 16, [20, 41], slots=4, dtype=torch.bfloat16, trailer=16)
    bias = torch.randn(2, 2, 11).to(torch.bfloat16)

    def outcome(op, device):
        p = pools.copy(device)
        first = torch.tensor([9, 30], dtype=torch.int32, device=device)
        new, host, pool = (
            t.to(device)[..., None] if t is bias else t[..., None] for t in (bias, p.bias_host, p.bias_pool)
        )
        op(new, new, first, p.host_table, host, host, pool, pool, p.slot_of)
        return p

    got = outcome(op, device)
    assert_same(got, outcome(reference, "cpu"))
    assert torch.equal(got.bias_host[int(pools.host_table[0, 0]), :, 9:], bias[0, :, :7])
    assert torch.equal(got.k_pool.cpu().nan_to_num(7.0), pools.k_pool.nan_to_num(7.0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("op", "device"), homes("append_chunk"))
def test_append_chunk(op, device, case):
    heads, dim, size, start, tokens, dtype, options = CASES[case]
    seq_lens = [max(first + tokens, 0) for first in start]
    # the tail block is resident and not full: its new tokens go to the pool as well
    pools = make_pools(heads, dim, size, seq_lens, dtype=dtype, **{"slots": 4, **options})
    k, v = (
        torch.randn(len(start), tokens, 2, heads, dim).to(dtype).permute(2, 0, 3, 1, 4)
    )  # strided over tokens

    def outcome(op, device):
        p = pools.copy(device)
        first = torch.tensor(start, dtype=torch.int32, device=device)
        op(k.to(device), v.to(device), first, p.host_table, p.k_host, p.v_host, p.k_pool, p.v_pool, p.slot_of)
        return p

    expected = outcome(reference, "cpu")
    assert_same(outcome(op, device), expected)
    for b, first in enumerate(start):
        for t in range(max(-first, 0), tokens):
            block, offset = divmod(first + t, size)
            assert torch.equal(expected.k_host[int(pools.host_table[b, block]), :, offset], k[b, :, t])
            assert torch.equal(expected.v_host[int(pools.host_table[b, block]), :, offset], v[b, :, t])
