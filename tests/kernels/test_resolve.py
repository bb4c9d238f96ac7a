"""resolve: tables, lists and counters bit for bit in every home, and a story with the expected slots."""

import pytest
import torch

from csrc_free_kernels.reference.resolve import resolve as reference
from tests.helpers.homes import homes, poison
from tests.helpers.pools import assert_same, make_pools

C, SINK, RECENT, STEP = 8, 1, 2, 7

# name: Hkv, slots, S, seq_lens, share of resident blocks
CASES = {
    "one-token": (1, 3, 2, [1], 0.0),
    "all-resident": (2, 12, 4, [80, 33], 1.0),
    "only-the-tail-resident": (2, 7, 6, [80, 73, 8], 0.0),
    "some-missing": (2, 9, 6, [100, 0, 64, 9], 0.5),
    "full-pool": (1, 7, 6, [200, 199], 1.0),
    "one-miss": (3, 5, 2, [96], 0.9),
    "wide": (1, 65, 60, [1600], 0.7),
}


def random_selection(pools, S):
    """Sink, tail and random others, ascending; rows that fit are selected whole."""
    rows, heads = pools.slot_base.shape
    selected = torch.full((rows, heads, S), -1, dtype=torch.int32)
    count = torch.zeros(rows, heads, dtype=torch.int32)
    for b, seq_len in enumerate(pools.seq_lens.tolist()):
        blocks = -(-seq_len // C)
        for h in range(heads if blocks else 0):
            others = torch.randperm(max(blocks - 2, 0))[: S - 2] + 1
            ids = sorted({0, blocks - 1, *others.tolist()})
            selected[b, h, : len(ids)] = torch.tensor(ids)
            count[b, h] = len(ids)
    return selected, count


def run(fn, device, pools, selected, count, *, list_before=0):
    """Returns the pools after the call, the outputs, and the load list as a set of pairs."""
    pools = pools.copy(device)
    heads, size = selected.shape[:2], selected.numel() + list_before
    hits, misses = (poison(*selected.shape, dtype=torch.int32, device=device) for _ in range(2))
    load_src, load_dst, load_at = (poison(size, dtype=torch.int32, device=device) for _ in range(3))
    load_count = torch.tensor([list_before], dtype=torch.int32, device=device)
    counters = torch.arange(heads[0] * heads[1] * 5, device=device).view(*heads, 5)
    fn(
        selected.to(device), count.to(device), pools.seq_lens, pools.host_table, pools.slot_of,
        pools.block_in, pools.last_used, pools.slot_base, pools.slot_count, pools.step, hits, misses,
        load_src, load_dst, load_at, load_count, counters, block_size=C, sink_blocks=SINK, recent_blocks=RECENT,
    )  # fmt: skip
    num = int(load_count)
    for part in (load_src, load_dst, load_at):
        assert (part[:list_before] == -77).all() and (part[num:] == -77).all(), "written outside the list"
    loads = [part[list_before:num].tolist() for part in (load_src, load_dst, load_at)]
    assert_grouped(loads[2], selected.shape[2])
    pairs = sorted(zip(*loads, strict=True))
    return pools, (hits.cpu(), misses.cpu(), counters.cpu()), pairs


def assert_grouped(at, width):
    """The loads of a (row, head) stand side by side, in the order of their ranks."""
    ranks, before = [where % width for where in at], [-1, *at]
    assert all(rank == 0 or where == last + 1 for where, last, rank in zip(at, before, ranks, strict=False))
    pairs = [where // width for where, rank in zip(at, ranks, strict=True) if rank == 0]
    assert len(set(pairs)) == len(pairs) and set(pairs) == {where // width for where in at}


def check(fn, device, pools, selected, count, **kw):
    want, got = (
        run(reference, "cpu", pools, selected, count, **kw),
        run(fn, device, pools, selected, count, **kw),
    )
    assert_same(got[0].copy("cpu"), want[0])
    for x, y in zip(got[1], want[1], strict=True):
        assert torch.equal(x, y)
    assert got[2] == want[2]
    return want


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("resolve"))
def test_matches_reference(fn, device, case):
    Hkv, slots, S, seq_lens, resident = CASES[case]
    pools = make_pools(Hkv, 8, C, seq_lens, slots=slots, dtype=torch.float32, resident=resident, step=STEP)
    selected, count = random_selection(pools, S)
    after, (hits, misses, counters), pairs = check(fn, device, pools, selected, count)
    assert torch.equal((hits >= 0) | (misses >= 0), selected >= 0)
    assert not ((hits >= 0) & (misses >= 0)).any()
    assert sorted(slot for _, slot, _ in pairs) == sorted(misses[misses >= 0].tolist())
    for b, h, s in (selected >= 0).nonzero().tolist():
        slot = int(torch.maximum(hits, misses)[b, h, s])
        assert int(after.slot_of[b, h, selected[b, h, s]]) == slot
        assert int(after.last_used[slot]) == STEP
        assert int(pools.slot_base[b, h]) <= slot < int(pools.slot_base[b, h] + pools.slot_count[b, h])


@pytest.mark.parametrize(("fn", "device"), homes("resolve"))
def test_appends_to_the_list(fn, device):
    """Loads that `append` or another layer listed before stay where they are."""
    pools = make_pools(2, 8, C, [100, 64], slots=9, dtype=torch.float32, resident=0.3, step=STEP)
    check(fn, device, pools, *random_selection(pools, 6), list_before=3)


@pytest.mark.parametrize(("fn", "device"), homes("resolve"))
def test_fewer_victims_than_misses(fn, device):
    """Three slots for four selected blocks: the sink and the tail stay, so the last misses find no slot."""
    pools = make_pools(1, 8, C, [80], slots=3, dtype=torch.float32, resident=1.0, step=STEP)
    selected = torch.tensor([[[2, 4, 6, 9]]], dtype=torch.int32)
    _, (hits, misses, _), pairs = check(fn, device, pools, selected, torch.tensor([[4]], dtype=torch.int32))
    found = int((hits >= 0).sum() + (misses >= 0).sum())
    assert found < 4 and len(pairs) == int((misses >= 0).sum())


@pytest.mark.parametrize(("fn", "device"), homes("resolve"))
def test_uneven_slot_counts(fn, device):
    """Heads may own different numbers of slots; slots beyond a head's count are not touched."""
    pools = make_pools(2, 8, C, [96, 90], slots=9, dtype=torch.float32, resident=0.4, step=STEP)
    pools.slot_count[0, 1] = 9
    for b, h, fewer in ((0, 0, 2), (1, 1, 1)):
        base = int(pools.slot_base[b, h])
        for slot in range(base + 9 - fewer, base + 9):
            block = int(pools.block_in[slot])
            if block >= 0:
                pools.slot_of[b, h, block], pools.block_in[slot] = -1, -1
        pools.slot_count[b, h] = 9 - fewer
    check(fn, device, pools, *random_selection(pools, 5))


@pytest.mark.parametrize(("fn", "device"), homes("resolve"))
def test_one_head_owns_the_pool(fn, device):
    """A head with four times its fair share of slots, more than a kernel looks at together."""
    pools = make_pools(1, 8, C, [2080, 0, 0, 0], slots=50, dtype=torch.float32, resident=0.0, step=STEP)
    pools.slot_base.fill_(1)
    pools.slot_count[:, 0] = torch.tensor([200, 0, 0, 0])
    pools.slot_of.fill_(-1)
    pools.block_in.fill_(-1)
    blocks = torch.cat([torch.tensor([259]), torch.randperm(259)[:194]]).int()
    slots = (torch.randperm(200)[:195] + 1).int()
    pools.slot_of[0, 0, blocks], pools.block_in[slots] = slots, blocks
    pools.last_used[slots] = torch.randint(0, 4, (195,)).int()
    _, (_, misses, _), _ = check(fn, device, pools, *random_selection(pools, 60))
    assert int((misses >= 0).sum()) > 7  # past the free slots, so there are evictions


@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_story(home):
    """One row, one head, 10 blocks of which 9 is the tail, slots 1..6, step 7.

    1. Slots hold 0 (sink), 9 (tail), 3, 5, free, 4; last used in steps 1, 6, 2, 2, 0, 3.
    2. Blocks 0, 2, 4, 6, 7, 9 are selected: 0, 4 and 9 are hits.
    3. Misses 2, 6, 7 take the free slot 5, then the oldest blocks 3 and 5 (equally old): slots 3, 4, 5.
    """
    fn, device = {p.id: p.values for p in homes("resolve")}.get(home, (reference, "cpu"))
    pools = make_pools(1, 8, C, [80], slots=6, dtype=torch.float32, resident=0.0, step=STEP)
    pools.slot_of.fill_(-1)
    pools.block_in[1:7] = torch.tensor([0, 9, 3, 5, -1, 4], dtype=torch.int32)
    pools.last_used[1:7] = torch.tensor([1, 6, 2, 2, 0, 3], dtype=torch.int32)
    for slot in (1, 2, 3, 4, 6):
        pools.slot_of[0, 0, pools.block_in[slot]] = slot
    selected = torch.tensor([[[0, 2, 4, 6, 7, 9, -1]]], dtype=torch.int32)
    count = torch.tensor([[6]], dtype=torch.int32)
    after, (hits, misses, counters), pairs = run(fn, device, pools, selected, count)
    assert hits.flatten().tolist() == [1, -1, 6, -1, -1, 2, -1]
    assert misses.flatten().tolist() == [-1, 3, -1, 4, 5, -1, -1]
    assert after.block_in[1:7].tolist() == [0, 9, 2, 6, 7, 4]
    assert after.last_used[1:7].tolist() == [7] * 6
    assert after.slot_of.flatten()[:10].tolist() == [1, -1, 3, -1, 6, -1, 4, 5, -1, 2]
    pages = pools.host_table[0].tolist()
    assert pairs == sorted([(pages[2], 3, 0), (pages[6], 4, 1), (pages[7], 5, 2)])
    # the tail is not counted: 5 selected, 2 of them hits; the sink is forced and a hit; 2 evictions
    assert (counters.flatten() - torch.arange(5)).tolist() == [5, 2, 1, 1, 2]
