"""token_bias and rank_bias: a number per token from its values, and the rank of blocks by it."""

import pytest
import torch

from csrc_free_kernels.reference.rank_bias import rank_bias as rank_reference
from csrc_free_kernels.reference.token_bias import token_bias as reference
from tests.helpers.homes import homes, poison
from tests.helpers.pools import assert_same_bits, make_pools
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("rows", "heads", "tokens", "dim", "dtype", "with_offset"),
    [
        (1, 1, 1, 64, FP32, False),
        (3, 2, 1, 80, BF16, True),
        (2, 4, 5, 16, FP16, True),
        (1, 5, 3, 256, FP32, True),
    ],
)
@pytest.mark.parametrize(("op", "device"), homes("token_bias"))
def test_token_bias(op, device, rows, heads, tokens, dim, dtype, with_offset):
    v = (
        torch.randn(rows, tokens, 2, heads, dim).to(dtype)[:, :, 1].transpose(1, 2)
    )  # a fused projection's view
    weight = (torch.randn(heads, heads * dim) * (heads * dim) ** -0.5 * 3).to(dtype)
    offset = torch.randn(heads).to(dtype) if with_offset else None
    scale = torch.randn(heads)
    scale[0] = -2.0  # its sign is the head's own

    def outcome(op, device, wide=None):
        args = [x if x is None else x.to(device, wide or x.dtype) for x in (v, weight, offset, scale)]
        out = poison(rows, tokens, heads, dtype=wide or dtype, device=device).transpose(1, 2)
        op(*args, out)
        return out

    assert_close(
        outcome(op, device), outcome(reference, "cpu", torch.float64), outcome(reference, "cpu"), dtype
    )


@pytest.mark.parametrize(("op", "device"), homes("token_bias"))
def test_extreme_values_stay_finite(op, device):
    """softplus of -200 is 0 and of 200 is 200."""
    out = poison(1, 1, 2, dtype=FP32, device=device)
    v = torch.tensor([-200.0, 200.0], device=device).view(1, 1, 2, 1)
    op(v, torch.ones(1, 1, device=device), None, torch.ones(1, device=device), out)
    assert out.flatten().tolist() == [0.0, 200.0]


# Hkv, C, W, seq_lens, dtype, pooling
RANKS = {
    "first-token": (1, 16, 1, [1], FP32, "windows"),
    "ragged": (2, 64, 4, [64, 0, 65, 80, 96, 191], FP32, "windows"),
    "one-part-a-block": (2, 16, 1, [16, 17, 32, 48, 33], FP32, "windows"),
    "bf16": (1, 32, 2, [32, 48, 64, 80], BF16, "windows"),
    "median": (2, 16, 16, [16, 0, 17, 33], FP32, "median"),
    "median-fp16": (1, 64, 64, [64, 65, 130], FP16, "median"),
}


@pytest.mark.parametrize("case", RANKS)
@pytest.mark.parametrize(("op", "device"), homes("rank_bias"))
def test_rank_bias(op, device, case):
    """Parts that are not complete are NaN in `unit_bias`, the heat of other blocks stays as it is."""
    heads, size, width, seq_lens, dtype, pooling = RANKS[case]
    pools = make_pools(heads, 16, size, seq_lens, slots=3, dtype=dtype, trailer=size)
    units = torch.full((len(pools.host), heads, width), torch.nan)
    for b, n in enumerate(seq_lens):
        for block in range(-(-n // size)):
            complete = min(max(n - 1 - block * size, 0) // (size // width), width)  # before the new token
            units[int(pools.host_table[b, block]), :, :complete] = torch.randn(heads, complete)
    heat = torch.randn(pools.slot_of.shape)

    def outcome(op, device, wide=None):
        p = pools.copy(device, wide)
        u, h = (x.to(device, wide or x.dtype, copy=True) for x in (units, heat))
        op(p.seq_lens, p.host_table, p.slot_of, p.bias_pool, u, h, block_size=size, pooling=pooling)
        return u, h

    truth, plain, got = (
        outcome(rank_reference, "cpu", torch.float64),
        outcome(rank_reference, "cpu"),
        outcome(op, device),
    )
    assert torch.equal(got[0].isnan().cpu(), plain[0].isnan()), "parts are written where they are complete"
    for x, exact, same in zip(got, truth, plain, strict=True):
        x, exact, same = (torch.where(y.isnan(), 7.0, y) for y in (x, exact, same))
        assert_close(x, exact, same, FP32)
    changed = got[1].cpu() != heat
    for b, n in enumerate(seq_lens):
        tail = (n - 1) // size
        assert changed[b, :, :].sum() == (heads if n > 0 and tail > 0 else 0)
        assert n == 0 or tail == 0 or changed[b, :, tail - 1].all()


@pytest.mark.parametrize(("op", "device"), homes("rank_bias"))
def test_median_with_ties(op, device):
    """Of 16 tokens, 8 are 1 and 8 are 2: more than half are above 0.5 but not above 1, so the block is worth 1."""
    pools = make_pools(1, 16, 16, [17], slots=3, dtype=FP32, trailer=16).copy(device)
    units = torch.zeros(len(pools.host), 1, 16, device=device)
    units[int(pools.host_table[0, 0]), 0] = torch.tensor([2.0, 1.0] * 8, device=device)
    heat = torch.zeros(pools.slot_of.shape, device=device)
    op(
        pools.seq_lens, pools.host_table, pools.slot_of, pools.bias_pool, units, heat, block_size=16,
        pooling="median",
    )  # fmt: skip
    expected = torch.zeros(pools.slot_of.shape)
    expected[0, 0, 0] = 1.0
    assert_same_bits(heat, expected, "heat")


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling must be 'windows' or 'median', not 'mean'"):
        rank_reference(*[torch.zeros(1, 1, 1)] * 6, block_size=1, pooling="mean")
