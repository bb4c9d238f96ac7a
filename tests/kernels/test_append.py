"""`append`: write-through, claiming the tail's slot, and the summaries it completes."""

import pytest
import torch

from csrc_free_kernels.reference.append import append as reference
from tests.helpers.homes import homes, poison
from tests.helpers.pools import assert_close_where_written, assert_same, make_pools

# (Hkv, D, C, seq_lens, dtype, kind, W, make_pools options)
CASES = {
    "first-token": (2, 64, 8, [1], torch.float32, "mean", 1, {}),
    "ragged-inactive": (2, 64, 8, [9, 0, 5, 8, 17, 16], torch.float32, "mean", 1, {}),
    "sub-units": (1, 80, 16, [4, 8, 12, 16, 17, 31], torch.bfloat16, "mean", 4, {}),
    "sub-units-fp16": (1, 96, 16, [4, 12, 32], torch.float16, "mean", 4, {}),
    "minmax": (2, 80, 8, [8, 7, 16], torch.float16, "minmax", 2, {}),
    "minmax-bf16": (1, 128, 32, [32, 33], torch.bfloat16, "minmax", 2, {}),
    "minmax-sub-units": (2, 80, 16, [4, 8, 15, 32], torch.float32, "minmax", 8, {}),
    "cuboid": (2, 80, 8, [8, 7, 16], torch.float32, "cuboid", 2, {}),
    "cuboid-bf16": (1, 128, 32, [32, 33], torch.bfloat16, "cuboid", 2, {}),
    "cuboid-sub-units": (1, 96, 32, [16, 32, 47], torch.float16, "cuboid", 4, {}),
    "no-summary": (1, 96, 8, [3, 9], torch.bfloat16, "none", 0, {}),
    "new-block-pool-full": (2, 64, 8, [33, 25], torch.float32, "mean", 1, {"slots": 4, "resident": 1.0}),
    "tail-was-evicted": (2, 64, 8, [31, 40, 6], torch.bfloat16, "mean", 2, {"tail_resident": False}),
    "evicted-and-full": (1, 80, 16, [79], torch.float32, "minmax", 2, {"tail_resident": False, "slots": 2}),
    "no-candidate": (1, 64, 8, [9, 16], torch.float32, "mean", 1, {"slots": 1, "tail_resident": False}),
    "real-size": (2, 128, 64, [128, 191], torch.bfloat16, "mean", 4, {"tail_resident": False}),
    "bias": (2, 64, 16, [9, 0, 17, 32], torch.float32, "mean", 1, {"trailer": 16}),
    "bias-tail-was-evicted": (
        2,
        80,
        16,
        [31, 40, 6],
        torch.bfloat16,
        "none",
        0,
        {"tail_resident": False, "trailer": 16},
    ),
    "bias-fp16": (
        1,
        64,
        16,
        [63],
        torch.float16,
        "mean",
        1,
        {"tail_resident": False, "slots": 2, "trailer": 24},
    ),
    "one-head-wide": (1, 256, 16, [32], torch.bfloat16, "mean", 1, {}),
}


def build(case: str):
    heads, dim, size, seq_lens, dtype, kind, width, options = CASES[case]
    pools = make_pools(heads, dim, size, seq_lens, dtype=dtype, new_tokens=1, **{"slots": 5, **options})
    # q, k and v of a fused projection: strided over rows and heads
    k_new, v_new = torch.randn(len(seq_lens), heads, 2, dim).to(dtype).unbind(2)
    summary = poison(len(pools.host), heads, width, dim, dtype=dtype, device="cpu") if width else None
    bias_new = torch.randn(2, heads, len(seq_lens)).to(dtype)[1].T if options.get("trailer") else None
    return pools, k_new, v_new, summary, kind, bias_new


def run(op, p, k_new, v_new, summary, load_count, kind, bias_new=None, **kw):
    bias = {} if bias_new is None else dict(bias_new=bias_new, bias_host=p.bias_host, bias_pool=p.bias_pool)
    op(
        k_new, v_new, p.seq_lens, p.host_table, p.k_host, p.v_host, p.k_pool, p.v_pool, p.slot_of, p.block_in,
        p.last_used, p.slot_base, p.slot_count, p.step, summary, load_count, sink_blocks=1, summary_kind=kind,
        **bias, **kw,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("op", "device"), homes("append"))
def test_append(op, device, case):
    pools, k_new, v_new, summary, kind, bias_new = build(case)

    def outcome(op, device, dtype=None):
        p = pools.copy(device, dtype)
        new = [t.to(device, dtype or t.dtype) for t in (k_new, v_new)]
        s = None if summary is None else summary.to(device, dtype or summary.dtype, copy=True)
        count = torch.full((1,), 5, dtype=torch.int32, device=device)
        bias = None if bias_new is None else bias_new.to(device, dtype or bias_new.dtype)
        run(op, p, *new, s, count, kind, bias)
        assert count.item() == 0
        return p, s

    expected, plain = outcome(reference, "cpu")
    _, truth = outcome(reference, "cpu", torch.float64)
    got, got_summary = outcome(op, device)
    assert_same(got, expected)
    if bias_new is not None:
        assert_bias_kept(got, bias_new)
    if summary is not None:
        assert_close_where_written(got_summary, truth, plain, k_new.dtype)


def assert_bias_kept(p, bias_new):
    """Every active row's new bias is on both sides, and what its tail block holds in the pool is what the host has."""
    for b, seq_len in enumerate(p.seq_lens.tolist()):
        block, offset = divmod(max(seq_len, 1) - 1, p.block_size)
        for h in range(bias_new.shape[1] if seq_len else 0):
            slot, page = int(p.slot_of[b, h, block]), int(p.host_table[b, block])
            assert p.bias_host[page, h, offset] == bias_new[b, h]
            assert torch.equal(p.bias_pool[slot, : offset + 1].cpu(), p.bias_host[page, h, : offset + 1])


@pytest.mark.parametrize(("op", "device"), homes("append"))
def test_token_by_token(op, device):
    """A row grows from nothing in a pool of three slots: block 0 is the sink, a new tail evicts the oldest.

    Afterwards the host holds every token, summaries are the block means, and the pool holds blocks 0, 3 and
    4.
    """
    size, dim, total = 4, 64, 20
    pools = make_pools(1, dim, size, [total], slots=3, dtype=torch.float32, new_tokens=total, step=0).copy(
        device
    )
    k, v = torch.randn(total, 1, 1, dim), torch.randn(total, 1, 1, dim)
    summary = poison(len(pools.host), 1, 1, dim, dtype=torch.float32, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    for t in range(total):
        pools.seq_lens.fill_(t + 1)
        pools.step += 1
        run(op, pools, k[t].to(device), v[t].to(device), summary, count, "mean")
    pages = pools.host_table[0, : total // size].long().cpu()
    assert torch.equal(pools.k_host[pages, 0].reshape(total, dim), k[:, 0, 0])
    assert torch.equal(pools.v_host[pages, 0].reshape(total, dim), v[:, 0, 0])
    torch.testing.assert_close(summary.cpu()[pages, 0, 0], k[:, 0, 0].unflatten(0, (-1, size)).mean(1))
    assert sorted(pools.block_in[pools.block_in >= 0].tolist()) == [0, 3, 4]
    slots = pools.slot_of[0, 0, [0, 3, 4]].long()
    assert torch.equal(pools.k_pool[slots].cpu(), pools.k_host[pages[[0, 3, 4]], 0])


@pytest.mark.parametrize(
    "case", ["ragged-inactive", "sub-units-fp16", "cuboid-bf16", "no-summary", "no-candidate"]
)
@pytest.mark.parametrize(("op", "device"), homes("append"))
def test_means_of_the_values(op, device, case):
    """They are completed beside the summary of the keys, whatever its kind, and change nothing else."""
    pools, k_new, v_new, summary, kind, _ = build(case)

    def outcome(op, device, dtype=None, width=1):
        p = pools.copy(device, dtype)
        new = [t.to(device, dtype or t.dtype) for t in (k_new, v_new)]
        s = None if summary is None else summary.to(device, dtype or summary.dtype, copy=True)
        shape = (len(pools.host), k_new.shape[1], width, k_new.shape[2])
        means = poison(*shape, dtype=dtype or k_new.dtype, device=device)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        run(op, p, *new, s, count, kind, value_summary=means)
        return p, means

    for width in (1, 2):
        expected, plain = outcome(reference, "cpu", width=width)
        _, truth = outcome(reference, "cpu", torch.float64, width=width)
        got, means = outcome(op, device, width=width)
        assert_same(got, expected)
        assert_close_where_written(means, truth, plain, k_new.dtype)
    if case == "ragged-inactive":
        block = pools.v_host[pools.host_table[3, 0], :].clone()
        block[:, 7] = v_new[3]
        torch.testing.assert_close(outcome(op, device)[1][pools.host_table[3, 0], :, 0].cpu(), block.mean(1))
