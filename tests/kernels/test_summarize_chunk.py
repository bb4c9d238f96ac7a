"""`summarize_chunk`: the sub-units and blocks that a prompt chunk completes."""

import pytest
import torch

from csrc_free_kernels.reference.summarize_chunk import summarize_chunk as reference
from tests.helpers.homes import homes, poison
from tests.helpers.pools import assert_close_where_written, make_pools

# (Hkv, D, C, start, Q, dtype, kind, W)
CASES = {
    "first-token-of-many": (1, 64, 8, [0], 1, torch.float32, "mean", 1),
    "one-block": (2, 64, 8, [0], 8, torch.float32, "mean", 1),
    "starts-in-a-block": (2, 64, 8, [5, 7, 8], 12, torch.float32, "mean", 1),
    "ragged-padding": (1, 80, 8, [-3, -20, -19, 0], 20, torch.bfloat16, "mean", 2),
    "sub-units": (1, 96, 16, [6, 13], 27, torch.float16, "mean", 4),
    "minmax": (2, 80, 16, [3, -5], 33, torch.bfloat16, "minmax", 2),
    "minmax-fp32": (1, 64, 32, [31], 40, torch.float32, "minmax", 2),
    "minmax-sub-units": (2, 80, 32, [3, 21], 50, torch.bfloat16, "minmax", 4),
    "minmax-sub-units-fp32": (1, 64, 16, [-2, 5], 39, torch.float32, "minmax", 8),
    "cuboid": (2, 80, 16, [3, -5], 33, torch.bfloat16, "cuboid", 2),
    "cuboid-fp32": (1, 64, 32, [31], 40, torch.float32, "cuboid", 2),
    "cuboid-sub-units": (1, 96, 32, [6, 13], 60, torch.float16, "cuboid", 4),
    "one-token-completes": (2, 64, 8, [7, 15], 1, torch.float32, "mean", 1),
    "real-size": (2, 128, 64, [50], 90, torch.bfloat16, "mean", 4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("op", "device"), homes("summarize_chunk"))
def test_summarize_chunk(op, device, case):
    heads, dim, size, start, tokens, dtype, kind, width = CASES[case]
    seq_lens = [max(first + tokens, 0) for first in start]
    pools = make_pools(heads, dim, size, seq_lens, slots=2, dtype=dtype)
    k = torch.randn(len(start), tokens, heads, dim).to(dtype).transpose(1, 2)
    for b, first in enumerate(start):  # the chunk's own tokens must come from `k`
        k[b, :, : max(-first, 0)] = float("nan")
        for position in range(max(first, 0), seq_lens[b]):
            page = int(pools.host_table[b, position // size])
            pools.k_host[page, :, position % size] = float("nan")

    def outcome(op, device, dtype=dtype):
        p = pools.copy(device, dtype)
        first = torch.tensor(start, dtype=torch.int32, device=device)
        summary = poison(len(p.host), heads, width, dim, dtype=dtype, device=device)
        op(k.to(device, dtype), first, p.host_table, p.k_host, summary, summary_kind=kind)
        return summary

    truth, plain = outcome(reference, "cpu", torch.float64), outcome(reference, "cpu")
    assert_close_where_written(outcome(op, device), truth, plain, dtype)
    vectors = 1 if kind == "mean" else 2
    unit = size * vectors // width
    completed = sum(
        max(n, 0) // unit - max(first, 0) // unit for n, first in zip(seq_lens, start, strict=True)
    )
    assert int((~torch.isnan(truth)).sum()) == completed * heads * dim * vectors


@pytest.mark.parametrize("kind", ["minmax", "cuboid"])
def test_reference_is_the_definition(kind):
    """Page by page: the extremes of its keys, or their middle and how far the keys are from it on average."""
    pools = make_pools(1, 16, 8, [24], slots=2, dtype=torch.float64)
    keys = torch.cat([pools.k_host[int(page), 0] for page in pools.host_table[0, :3]])
    summary = poison(len(pools.host), 1, 4, 16, dtype=torch.float64, device="cpu")
    reference(keys[None, None], torch.tensor([0]), pools.host_table, pools.k_host, summary, summary_kind=kind)
    for u in range(6):  # two pages of four tokens a block
        high, low = summary[pools.host_table[0, u // 2], 0, u % 2 * 2 : u % 2 * 2 + 2]
        for d in range(16):
            values = [float(x) for x in keys[4 * u : 4 * u + 4, d]]
            top, bottom = max(values), min(values)
            if kind == "cuboid":
                centre = (top + bottom) / 2
                radius = sum(abs(x - centre) for x in values) / 4
                top, bottom = centre + radius, centre - radius
            assert float(high[d]) == pytest.approx(top, rel=1e-12)
            assert float(low[d]) == pytest.approx(bottom, rel=1e-12)


def test_equals_append():
    """A prompt appended in chunks has the summaries of the same prompt appended at once."""
    pools = make_pools(1, 64, 16, [48], slots=2, dtype=torch.float64)
    k = torch.cat([pools.k_host[int(page), 0] for page in pools.host_table[0, :3]])[None, None]
    whole, parts = (poison(len(pools.host), 1, 4, 64, dtype=torch.float64, device="cpu") for _ in range(2))
    reference(k, torch.tensor([0]), pools.host_table, pools.k_host, whole, summary_kind="mean")
    for begin, end in ((0, 5), (5, 6), (6, 31), (31, 48)):
        chunk, start = k[:, :, begin:end], torch.tensor([begin])
        reference(chunk, start, pools.host_table, pools.k_host, parts, summary_kind="mean")
    assert_close_where_written(parts, whole, whole, torch.float64)
    assert int((~torch.isnan(whole)).sum()) == 12 * 64
