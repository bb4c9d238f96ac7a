"""open_groups: every home against the reference; the bound holds, and only bounds that count are read."""

import pytest
import torch

from csrc_free_kernels.reference.open_groups import open_groups as reference
from tests.helpers.homes import homes, poison

C, GROUP = 4, 4
SPAN = C * GROUP
# Hkv, G, D, seq_lens, keep
CASES = {
    "ragged": (2, 4, 64, [9 * SPAN + 3, 0, SPAN, 5 * SPAN, 3], 0.5),
    "one-head": (1, 1, 64, [7 * SPAN - 1, 2 * SPAN], 0.25),
    "wide": (1, 8, 128, [40 * SPAN], 0.125),
    "all": (2, 3, 64, [8 * SPAN, 6 * SPAN + 1], 1.0),
}


def build(case, ties=False):
    heads, group, dim, seq_lens, keep = CASES[case]
    rows, blocks = len(seq_lens), max(seq_lens) // C + GROUP
    summary = torch.full((rows * blocks + 1, heads, 1, dim), torch.nan)
    table = torch.full((rows, blocks), -1, dtype=torch.int32)
    bounds = torch.full((rows, heads, -(-blocks // GROUP), 2, dim), torch.nan)
    pages = iter((torch.randperm(rows * blocks) + 1).tolist())
    for b, n in enumerate(seq_lens):
        for i in range(n // C):
            table[b, i] = page = next(pages)
            key = torch.randn(heads, dim)
            summary[page, :, 0] = key.sign() if ties else key
        for m in range(max(n // SPAN - 1, 0)):  # the newest complete group's are not read: NaN
            keys = summary[table[b, m * GROUP : (m + 1) * GROUP].long(), :, 0]
            bounds[b, :, m] = torch.stack((keys.amax(0), keys.amin(0)), 1)
    q = torch.randn(rows, heads * group, dim)
    q = q.sign() if ties else q
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return q, bounds, summary, table, lens, keep


def run(fn, device, world, due=None):
    q, bounds, summary, table, lens, keep = (
        t.to(device) if isinstance(t, torch.Tensor) else t for t in world
    )
    bounds = bounds.clone()
    shape = bounds.shape[:3]
    arrivals = torch.zeros(shape[:2], dtype=torch.int32, device=device)
    scores = poison(*shape, dtype=torch.float32, device=device)
    is_open = torch.full(shape, 7, dtype=torch.uint8, device=device)
    fn(
        q, bounds, summary, table, lens, arrivals, scores, is_open,
        block_size=C, group_blocks=GROUP, keep=keep, due=None if due is None else due.to(device),
    )  # fmt: skip
    assert not arrivals.any()
    return is_open.cpu(), bounds.cpu()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("open_groups"))
def test_matches_reference(fn, device, case, ties):
    world = build(case, ties)
    got, want = run(fn, device, world), run(reference, "cpu", world)
    active = world[4] > 0
    assert torch.equal(got[0][active], want[0][active]) and (got[0][~active] == 7).all()
    assert torch.equal(got[1].nan_to_num(-77.0), want[1].nan_to_num(-77.0))


@pytest.mark.parametrize(("fn", "device"), homes("open_groups"))
def test_rows_that_are_not_due_keep_the_mask_and_get_their_bounds(fn, device):
    world = build("ragged")
    due = torch.zeros_like(world[4])
    is_open, bounds = run(fn, device, world, due)
    assert (is_open == 7).all()
    assert torch.equal(bounds.nan_to_num(-77.0), run(reference, "cpu", world)[1].nan_to_num(-77.0))
    assert not bounds[3, :, 4].isnan().any()


def test_no_mean_key_of_a_group_exceeds_its_bound():
    heads, group, dim, *_ = CASES["ragged"]
    q, bounds, summary, table, lens, _ = build("ragged")
    by_head = q[0].view(heads, group, dim)
    for m in range(int(lens[0]) // SPAN - 1):
        keys = summary[table[0, m * GROUP : (m + 1) * GROUP].long(), :, 0]
        bound = torch.maximum(by_head * bounds[0, :, m, :1], by_head * bounds[0, :, m, 1:]).sum(-1)
        assert (torch.einsum("hgd,nhd->hgn", by_head, keys) <= bound[..., None] + 1e-4).all()


@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_refuses_what_it_cannot_do(home):
    fn, device = {p.id: p.values for p in homes("open_groups")}.get(home, (reference, "cpu"))
    world = build("one-head")
    with pytest.raises(ValueError, match="keep must be"):
        run(fn, device, (*world[:5], 0.0))
    with pytest.raises(ValueError, match="do not cover"):
        run(fn, device, (world[0], world[1][:, :, :2], *world[2:]))
