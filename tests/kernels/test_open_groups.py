"""open_groups: every home against the reference; the bound holds, and only bounds that count are read."""

import pytest
import torch

from csrc_free_kernels.reference.open_groups import open_groups as reference
from tests.helpers.homes import homes, poison

C, GROUP = 4, 4
SPAN = C * GROUP
# Hkv, G, D, seq_lens, (sink, recent, query, agnostic)
CASES = {
    "ragged": (2, 4, 64, [9 * SPAN + 3, 0, SPAN, 8 * SPAN, 3], (1, 2, 2, 1)),
    "one-head": (1, 1, 64, [7 * SPAN - 1, 2 * SPAN], (0, 2, 2, 0)),
    "wide": (1, 8, 128, [40 * SPAN], (1, 3, 6, 5)),
    "all-fit": (2, 3, 64, [8 * SPAN, 6 * SPAN + 1], (1, 2, 4, 1)),
    "one-too-many": (2, 3, 64, [9 * SPAN, 8 * SPAN + 1], (1, 2, 4, 1)),
    "partial-page": (2, 7, 80, [9 * SPAN + C, 5 * SPAN + 2 * C + 1], (1, 2, 1, 1)),
    "heat-only": (1, 2, 64, [12 * SPAN + 5], (0, 2, 0, 3)),
}
NAMES = ("sink_groups", "recent_groups", "query_groups", "agnostic_groups")


def build(case, ties=False):
    heads, group, dim, seq_lens, shares = CASES[case]
    rows, blocks = len(seq_lens), max(seq_lens) // C + 1
    summary = torch.full((rows * blocks + 1, heads, 1, dim), torch.nan)
    table = torch.full((rows, blocks), -1, dtype=torch.int32)
    bounds = torch.full((rows, heads, -(-blocks // GROUP), 2, dim), torch.nan)
    heat = torch.full((rows, heads, blocks), torch.nan)
    pages = iter((torch.randperm(rows * blocks) + 1).tolist())
    for b, n in enumerate(seq_lens):
        for i in range(-(-n // C)):
            table[b, i] = page = next(pages)
            key = torch.randn(heads, dim)
            if i < n // C:  # the open block has none
                summary[page, :, 0] = key.sign() if ties else key
            heat[b, :, i] = torch.rand(heads).mul(3).round() if ties else torch.rand(heads)
        for m in range(n // SPAN):
            keys = summary[table[b, m * GROUP : (m + 1) * GROUP].long(), :, 0]
            if m < (n - 1) // SPAN + 1 - shares[1]:  # those of the forced recent ones are not read: NaN
                bounds[b, :, m] = torch.stack((keys.amax(0), keys.amin(0)), 1)
    q = torch.randn(rows, heads * group, dim)
    q = q.sign() if ties else q
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return q, bounds, summary, heat if shares[3] else None, table, lens, shares


def run(fn, device, world, due=None, lists=None):
    *tensors, shares = world
    q, bounds, summary, heat, table, lens = (None if t is None else t.to(device, copy=True) for t in tensors)
    before = None if heat is None else heat.clone()
    arrivals = torch.zeros(bounds.shape[:2], dtype=torch.int32, device=device)
    scores = poison(*bounds.shape[:2], 2, bounds.shape[2], dtype=torch.float32, device=device)
    opened = poison(*bounds.shape[:2], sum(shares), dtype=torch.int32, device=device)
    count = poison(*bounds.shape[:2], dtype=torch.int32, device=device)
    if lists is not None:
        opened, count = (t.to(device, copy=True) for t in lists)
    fn(
        q, bounds, summary, heat, table, lens, arrivals, scores, opened, count,
        block_size=C, group_blocks=GROUP, due=None if due is None else due.to(device),
        **dict(zip(NAMES, shares, strict=True)),
    )  # fmt: skip
    assert not arrivals.any()
    assert heat is None or torch.equal(heat.nan_to_num(-5.0), before.nan_to_num(-5.0)), "heat is only read"
    return opened.cpu(), count.cpu(), bounds.cpu()


def assert_equal(got, want):
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.nan_to_num(-77.0), y.nan_to_num(-77.0))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("open_groups"))
def test_matches_reference(fn, device, case, ties):
    world = build(case, ties)
    assert_equal(run(fn, device, world), run(reference, "cpu", world))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("fn", "device"), homes("open_groups"))
def test_narrow_types(fn, device, dtype):
    q, bounds, summary, *rest = build("wide")
    world = (q.to(dtype), bounds.to(dtype), summary.to(dtype), *rest)
    assert_equal(run(fn, device, world), run(reference, "cpu", world))


@pytest.mark.parametrize("case", CASES)
def test_reference_by_hand(case):
    """Forced groups, then the best bounds, then the largest heat: one (row, head) after the other, without `select`."""
    q, bounds, summary, heat, _, lens, (sink, recent, query, agnostic) = world = build(case)
    opened, count, kept = run(reference, "cpu", world)
    heads, limit = summary.shape[1], sink + recent + query + agnostic
    for b, n in enumerate(lens.tolist()):
        groups = -(-n // SPAN)
        for h in range(heads):
            want = set(range(groups))
            if groups > limit:
                rest = set(range(sink, groups - recent))
                by_head = q[b].unflatten(0, (heads, -1))[h]
                bound = {
                    m: torch.maximum(by_head * bounds[b, h, m, 0], by_head * bounds[b, h, m, 1]).sum(-1).max()
                    for m in rest
                }
                best = sorted(rest, key=lambda m, bound=bound: -bound[m])[:query]
                left = rest - set(best)
                hot = []
                if agnostic:
                    hottest = {m: heat[b, h, m * GROUP : (m + 1) * GROUP].max() for m in left}
                    hot = sorted(left, key=lambda m, hottest=hottest: -hottest[m])[:agnostic]
                want -= left - set(hot)
            assert opened[b, h].tolist() == sorted(want) + [-1] * (limit - len(want))
            assert count[b, h] == len(want)
        if n and n % SPAN == 0:
            assert not kept[b, :, n // SPAN - 1].isnan().any()


@pytest.mark.parametrize(("fn", "device"), homes("open_groups"))
def test_rows_that_are_not_due_keep_their_lists_and_get_their_bounds(fn, device):
    world = build("ragged")
    opened, count, bounds = run(reference, "cpu", world)
    lists = (torch.full_like(opened, 5), torch.full_like(count, 6))
    due = torch.tensor([0, 0, 0, 0, 1], dtype=torch.int32)
    got = run(fn, device, world, due, lists)
    inactive = torch.tensor([False, True, False, False, False])[:, None, None]
    keep = (due == 0)[:, None, None]
    want = torch.where(inactive, -1, torch.where(keep, lists[0], opened))
    numbers = torch.where(inactive[..., 0], 0, torch.where(keep[..., 0], lists[1], count))
    assert_equal(got, (want, numbers, bounds))
    assert not got[2][3, :, 7].isnan().any()


def test_no_mean_key_of_a_group_exceeds_its_bound():
    heads, group, dim, _, shares = CASES["ragged"]
    q, bounds, summary, _, table, lens, _ = build("ragged")
    by_head = q[0].view(heads, group, dim)
    for m in range((int(lens[0]) - 1) // SPAN + 1 - shares[1]):
        keys = summary[table[0, m * GROUP : (m + 1) * GROUP].long(), :, 0]
        bound = torch.maximum(by_head * bounds[0, :, m, :1], by_head * bounds[0, :, m, 1:]).sum(-1)
        assert (torch.einsum("hgd,nhd->hgn", by_head, keys) <= bound[..., None] + 1e-4).all()


@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_refuses_what_it_cannot_do(home):
    fn, device = {p.id: p.values for p in homes("open_groups")}.get(home, (reference, "cpu"))
    world = build("ragged")
    with pytest.raises(ValueError, match="recent_groups must be at least 2"):
        run(fn, device, (*world[:6], (1, 1, 3, 1)))
    with pytest.raises(ValueError, match="needs heat"):
        run(fn, device, (*world[:3], None, *world[4:]))
    with pytest.raises(ValueError, match="are not those of"):
        run(fn, device, (world[0], world[1][:, :, :2], *world[2:]))
