"""decide among the blocks of open groups: by hand, every home against the reference, and what a home must not read."""

import dataclasses

import pytest
import torch

from csrc_free_kernels.reference import decide as truth
from csrc_free_kernels.reference.decide import decide as reference
from tests.helpers.homes import homes
from tests.helpers.pools import assert_same
from tests.helpers.tolerance import assert_close
from tests.kernels.test_decide import BF16, FP16, FP32, STEP, C, build, run

R = 4
SPAN = C * R
# As in test_decide: score, Hkv, G, D, slots, S, (sink, recent, query, agnostic), seq_lens, normalise, dtype; then K.
CASES = {
    "ragged": (("mean", 2, 4, 64, 12, 10, (1, 2, 4, 3), [400, 0, 97, 9, 385], "sum", FP32), 5),
    "group-full": (("mean", 2, 3, 80, 12, 10, (1, 3, 4, 2), [20 * SPAN, 6 * SPAN + 1, SPAN], "sum", FP32), 5),
    "softmax": (("mean", 1, 1, 64, 9, 8, (0, 1, 4, 3), [1000, 321], "softmax", FP16), 4),
    "kept-heat": (("mean", 1, 7, 96, 14, 13, (2, 4, 4, 3), [1500, 700], "none", BF16), 6),
    "query-only": (("mean", 2, 2, 64, 9, 8, (1, 2, 5, 0), [700, 640], "none", FP32), 4),
    "many": (("mean", 1, 4, 128, 66, 64, (1, 16, 24, 23), [9000, 3333], "sum", BF16), 40),
}


def groups_of(case: str, world) -> dict:
    """Random open groups, those of sink and recent blocks among them; all of a row's while the list holds them."""
    listed, recent = CASES[case][1], world.kw["recent_blocks"]
    rows, heads = world.pools.slot_of.shape[:2]
    opened = torch.full((rows, heads, listed), -1, dtype=torch.int32)
    for b, n in enumerate(world.pools.seq_lens.tolist()):
        groups = -(-n // SPAN)
        last = max((-(-n // C) - recent) // R, 0)
        forced = {*range(min(-(-world.kw["sink_blocks"] // R), groups)), *range(last, groups)}
        for h in range(heads):
            free = [m for m in torch.randperm(groups).tolist() if m not in forced]
            ids = sorted([*forced, *free[: listed - len(forced)]])
            opened[b, h, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return dict(open_groups=opened, num_open=(opened >= 0).sum(-1).int(), group_blocks=R)


def make(case: str, **kwargs):
    """A step whose closed groups hold NaN summaries, and the lists of its open groups."""
    world = build(CASES[case][0], **kwargs)
    groups = groups_of(case, world)
    blocks = torch.arange(world.pools.host_table.shape[1])
    is_open = (groups["open_groups"][..., None] == blocks // R).any(2)  # [B, Hkv, N]
    row, head, block = (~is_open).nonzero(as_tuple=True)
    world.summary[world.pools.host_table[row, block].clamp(min=0).long(), head] = torch.nan
    return world, groups, is_open


def given(monkeypatch, scores: torch.Tensor):
    """Let the reference take these scores in place of its own."""
    monkeypatch.setattr(
        truth, "score_mean", lambda *args, **_: args[6].copy_(scores.reshape(args[6].shape).to(args[6].dtype))
    )


def check(fn, device, monkeypatch, world, groups, **more):
    pools, exact, pairs, scores, heat = run(fn, device, world, **groups, **more)
    wide = dataclasses.replace(world, q=world.q.double(), summary=world.summary.double())
    assert_close(
        scores, run(reference, "cpu", wide, **groups, **more)[3], run(reference, "cpu", world, **groups, **more)[3],
        world.q.dtype,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        given(patch, scores)
        want = run(reference, "cpu", world, **groups, **more)
    assert_same(pools, want[0])
    for got, expected in zip(exact, want[1], strict=True):
        assert torch.equal(got, expected)
    assert pairs == want[2]
    if heat is not None:
        assert torch.equal(torch.isnan(heat), torch.isnan(world.heat))
        exists = ~torch.isnan(world.heat)
        assert_close(heat[exists], want[4][exists].double(), want[4][exists], FP32)
    return want


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("resident", [0.0, 0.6])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_matches_reference(fn, device, monkeypatch, case, resident, ties):
    world, groups, is_open = make(case, resident=resident, ties=ties)
    want = check(fn, device, monkeypatch, world, groups)
    if world.heat is not None:
        assert torch.equal(want[4][~is_open].nan_to_num(-5.0), world.heat[~is_open].nan_to_num(-5.0))
    taken = want[1][0]
    assert is_open.gather(2, taken.clamp(min=0).long())[taken >= 0].all()


@pytest.mark.parametrize("case", CASES)
def test_reference_by_hand(case):
    """One (row, head) after the other: softmax over the closed candidates, then the picks, then the heat."""
    world, groups, is_open = make(case)
    wide = dataclasses.replace(world, q=world.q.double(), summary=world.summary.double())
    _, (selected, count, *_), _, scores, heat = run(reference, "cpu", wide, **groups)
    sink, recent, query, agnostic = CASES[case][0][6]
    heads = selected.shape[1]
    for b, n in enumerate(world.pools.seq_lens.tolist()):
        blocks, closed = -(-n // C), n // C
        for h in range(heads):
            candidates = [i for i in range(blocks) if is_open[b, h, i]]
            scored = [i for i in candidates if i < closed]
            keys = wide.summary[world.pools.host_table[b, scored].long(), h, 0]
            q = wide.q[b].unflatten(0, (heads, -1))[h] * world.kw["softmax_scale"]
            shares = (q @ keys.T).softmax(-1).mean(0).tolist()
            score = dict.fromkeys(candidates, -torch.inf) | dict(zip(scored, shares, strict=True))
            for m, got in enumerate(scores[b, h].tolist()):
                block = int(groups["open_groups"][b, h, m // R]) * R + m % R
                assert got == pytest.approx(score.get(block, -torch.inf))
            want = set(candidates)
            if blocks > CASES[case][0][5]:
                rest = [i for i in candidates if sink <= i < blocks - recent]
                best = sorted(rest, key=lambda i: -score[i])[:query]  # noqa: B023
                left = [i for i in rest if i not in best]
                hot = sorted(left, key=lambda i: -world.heat[b, h, i])[:agnostic] if agnostic else []  # noqa: B023
                want = set(candidates) - set(rest) | set(best) | set(hot)
            assert selected[b, h, : count[b, h]].tolist() == sorted(want)
            if world.kw["normalise"] == "sum":
                for i in range(blocks):
                    new = world.heat[b, h, i].item()
                    if i in score:
                        new = 0.75 * new + (score[i] / sum(shares) if i in scored else 0.0)
                    assert heat[b, h, i].item() == pytest.approx(new, rel=1e-5)


@pytest.mark.parametrize("normalise", ["sum", "softmax"])
@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_all_groups_open_is_as_without(home, normalise):
    """The same ids, tables, loads, scores and heat; what a short row's list does not hold is no block either."""
    fn, device = {p.id: p.values for p in homes("decide")}.get(home, (reference, "cpu"))
    world = build(("mean", 2, 4, 64, 12, 10, (1, 2, 4, 3), [400, 0, 97, 9, 32], normalise, FP32))
    blocks = world.pools.host_table.shape[1]
    listed = -(-blocks // R)
    ids = torch.arange(listed, dtype=torch.int32)
    exists = (ids * SPAN < world.pools.seq_lens[:, None])[:, None].expand(-1, 2, -1)
    groups = dict(open_groups=torch.where(exists, ids, -1), num_open=exists.sum(-1).int(), group_blocks=R)
    flat, got = run(fn, device, world), run(fn, device, world, **groups)
    assert_same(got[0], flat[0])
    for x, y in zip(got[1], flat[1], strict=True):
        assert torch.equal(x, y)
    assert got[2] == flat[2]
    same = (
        torch.allclose if home == "reference" else torch.equal
    )  # a product of another shape rounds elsewhere
    assert same(got[3][..., :blocks], flat[3])
    assert same(got[4].nan_to_num(-5.0), flat[4].nan_to_num(-5.0))


@pytest.mark.parametrize("case", ["ragged", "group-full"])
@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_rows_that_are_not_due(home, case):
    """They resolve the list they had; what is listed as open for them may be anything."""
    fn, device = {p.id: p.values for p in homes("decide")}.get(home, (reference, "cpu"))
    world, groups, _ = make(case)
    due = torch.ones_like(world.pools.seq_lens)
    due[0] = 0
    want = run(reference, "cpu", world, **groups)
    lists = tuple(t.clone() for t in want[1][:2])
    lists[0][0, :, 1] += 1 if lists[0][0, 0, 1] + 1 < lists[0][0, 0, 2] else 0
    groups["open_groups"][0], groups["num_open"][0] = 1 << 26, 3  # far outside: a read there breaks
    world.summary[world.pools.host_table[0].clamp(min=0).long()] = torch.nan
    got = run(fn, device, world, lists=lists, due=due, **groups)
    assert torch.equal(got[1][0][0], lists[0][0]) and torch.equal(got[1][1][0], lists[1][0])
    assert torch.equal(got[4][0].nan_to_num(-5.0), world.heat[0].nan_to_num(-5.0))
    assert (got[3][0] == -torch.inf).all()
    assert torch.equal(got[1][0][1:], want[1][0][1:])
    again = run(reference, "cpu", world, lists=lists, due=due, **groups)
    assert got[2] == again[2]
    assert_same(got[0], again[0])


@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_step_after_step(fn, device, monkeypatch):
    world, groups, _ = make("ragged")
    for step in range(3):
        world.q = torch.randn_like(world.q)
        want = check(fn, device, monkeypatch, world, groups)
        world.pools, world.heat = want[0], want[4]
        world.pools.step.fill_(STEP + step + 1)


@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_refuses_what_it_cannot_do(home):
    fn, device = {p.id: p.values for p in homes("decide")}.get(home, (reference, "cpu"))
    world, groups, _ = make("ragged")
    with pytest.raises(ValueError, match="score 'mean' and rule 'fixed'"):
        run(fn, device, dataclasses.replace(world, kw=world.kw | {"rule": "mass", "limit": 0.5}), **groups)
    with pytest.raises(ValueError, match="score 'mean' and rule 'fixed'"):
        run(fn, device, dataclasses.replace(world, kw=world.kw | {"score": "minmax"}), **groups)
    few = {name: x[..., :3] if name == "open_groups" else x for name, x in groups.items()}
    with pytest.raises(ValueError, match="may hold fewer than"):
        run(fn, device, world, **few)
