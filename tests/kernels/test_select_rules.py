"""select with a rule: how many blocks are taken, bit for bit in every home, and the reference by its definition."""

import math
from fractions import Fraction

import pytest
import torch

from csrc_free_kernels.reference.select import select as reference
from tests.helpers.homes import homes
from tests.kernels.test_select import INF, check, random_scores, run

# name: rule, limit, Hkv, C, N, S, (sink, recent, query, agnostic), seq_lens
CASES = {
    "scored": ("scored", 0.0, 2, 8, 40, 12, (1, 2, 6, 3), [320, 77, 0, 5]),
    "threshold": ("threshold", 0.03, 2, 8, 50, 14, (1, 3, 6, 4), [400, 393, 0, 100, 9]),
    "threshold-nothing": ("threshold", 1.0, 1, 8, 30, 9, (1, 2, 4, 2), [240, 33]),
    "threshold-zero": ("threshold", 0.0, 1, 8, 30, 29, (1, 2, 26, 0), [240, 33]),
    "mass": ("mass", 0.6, 2, 8, 50, 22, (1, 3, 16, 2), [400, 393, 0, 100, 9]),
    "mass-small": ("mass", 0.05, 2, 8, 50, 14, (1, 3, 10, 0), [400, 100]),
    "mass-all": ("mass", 1.0, 2, 8, 30, 30, (1, 1, 28, 0), [240, 239, 17]),
    "mass-capped": ("mass", 0.9, 1, 8, 50, 8, (0, 1, 4, 3), [400, 49]),
    "margin": ("margin", 0.3, 2, 8, 50, 20, (1, 3, 12, 4), [400, 393, 0, 100]),
    "margin-zero": ("margin", 0.0, 1, 8, 30, 9, (1, 2, 4, 2), [240]),
    "margin-all": ("margin", INF, 1, 8, 30, 30, (1, 2, 20, 7), [240, 41]),
}
KINDS = ["random", "ties", "signed", "zeros", "odd", "nothing", "peaks"]
LONG = ("mass", 0.8, 1, 64, 1500, 300, (1, 16, 200, 83), [96000, 40000])


def scores_of(case, kind):
    _, _, heads, C, N, _, _, lens = case
    if kind == "peaks":  # spread over many powers of two, down to what weighs nothing but is there
        return (random_scores(len(lens), heads, N, C, lens, "random") * 90 - 80).exp()
    return random_scores(len(lens), heads, N, C, lens, kind)


def arguments(case):
    rule, limit, _, C, _, S, shares, lens = case
    return (lens, S, shares), dict(block_size=C, rule=rule, limit=limit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("select"))
def test_matches_reference(fn, device, name, kind):
    case = CASES[name]
    scores = scores_of(case, kind)
    heat = random_scores(len(case[-1]), case[2], case[4], case[3], case[-1], "ties")
    args, kw = arguments(case)
    normalise = "none" if kind in ("signed", "peaks") else "softmax" if case[0] == "margin" else "sum"
    check(fn, device, scores, heat, *args, **kw, normalise=normalise)


@pytest.mark.parametrize(("fn", "device"), homes("select"))
def test_long_rows_without_heat(fn, device):
    args, kw = arguments(LONG)
    check(fn, device, scores_of(LONG, "peaks"), scores_of(LONG, "ties"), *args, **kw, normalise="none")
    lens, S, (sink, recent, query, _) = args
    check(
        fn, device, scores_of(LONG, "ties"), None, lens, S, (sink, recent, query, 0), **kw, normalise="none"
    )


def taken_by(rule, limit, scores, forced, nb):
    """The rule in exact fractions: how many of the best blocks beyond the forced ones."""
    known = {n: scores[n] for n in range(nb) if math.isfinite(scores[n])}
    best = sorted((n for n in known if n not in forced), key=lambda n: (-known[n], n))
    top = max(known.values(), default=0.0)
    if rule == "scored":
        return best
    if rule == "margin":
        cut = torch.tensor(top, dtype=torch.float32) - limit
        return [n for n in best if known[n] > cut]
    weight = {
        n: math.ceil(torch.tensor(x).div(top).mul(2.0**26).item()) if x > 0 else 0 for n, x in known.items()
    }
    total = Fraction(round(limit * 2**20), 2**20) * sum(weight.values())
    if rule == "threshold":
        return [n for n in best if weight[n] > total]
    held, taken = sum(w for n, w in weight.items() if n in forced), []
    while held < total:
        taken.append(best[len(taken)])
        held += weight[taken[-1]]
    return taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name, kind):
    case = CASES[name]
    rule, limit, heads, C, N, S, (sink, recent, query, agnostic), lens = case
    scores = scores_of(case, kind)
    heat = random_scores(len(lens), heads, N, C, lens, "ties")
    args, kw = arguments(case)
    ids, count, _ = run(reference, "cpu", scores, heat, *args, **kw, normalise="none")
    for b, seq_len in enumerate(lens):
        nb = -(-seq_len // C)
        for h in range(heads):
            row = scores[b, h].tolist()
            want = [n for n in range(nb) if n < sink or n >= nb - recent]
            want += taken_by(rule, limit, row, want, nb)[:query]
            left = [n for n in range(nb) if n not in want and math.isfinite(row[n])]
            want += sorted(left, key=lambda n: (-heat[b, h, n], n))[:agnostic]
            assert ids[b, h].tolist() == sorted(want) + [-1] * (S - len(want))
            assert int(count[b, h]) == len(want)


def test_shares_mean_what_they_say():
    """Scores 8, 4, 2, 1, 1 (a sixteenth each unit), the first block forced, the open one too."""
    scores = torch.tensor([[[8.0, 2.0, 4.0, 1.0, 1.0, 77.0]]])
    scores[..., 5] = -INF

    def ids(rule, limit, query=4):
        kw = dict(block_size=8, rule=rule, limit=limit, normalise="none")
        return run(reference, "cpu", scores, None, [48], 6, (1, 1, query, 0), **kw)[0][0, 0].tolist()

    assert ids("mass", 0.5) == [0, 5, -1, -1, -1, -1], "the forced block holds half of it"
    assert ids("mass", 0.5001) == ids("mass", 0.75) == [0, 2, 5, -1, -1, -1]
    assert ids("mass", 0.8) == [0, 1, 2, 5, -1, -1]
    assert ids("mass", 0.9) == [0, 1, 2, 3, 5, -1], "of equals the lower id"
    assert ids("mass", 1.0) == [0, 1, 2, 3, 4, 5]
    assert ids("threshold", 1 / 16) == [0, 1, 2, 5, -1, -1], "more than the share, not as much"
    assert ids("threshold", 0.2, query=1) == [0, 2, 5, -1, -1, -1]
    assert ids("margin", 6.0) == [0, 2, 5, -1, -1, -1]
    assert ids("margin", 7.5) == ids("scored", 0.0) == [0, 1, 2, 3, 4, 5]
    assert ids("margin", 7.5, query=3) == [0, 1, 2, 3, 5, -1], "the budget is a cap"


@pytest.mark.parametrize(
    "case", [("fixed", 0.0, (1, 2, 3, 2)), ("mass", 0.5, (1, 2, 3, 2)), ("fixed", 0.0, (1, 4, 0, 0))]
)
@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_rows_that_are_not_due_keep_their_lists(home, case):
    """Active rows at 0 keep list, count and heat, whatever their scores; inactive rows are empty all the same."""
    fn, device = {p.id: p.values for p in homes("select")}.get(home, (reference, "cpu"))
    rule, limit, shares = case
    lens, S = [300, 299, 8, 0, 0, 77], 9
    scores, heat = (random_scores(6, 2, 40, 8, lens, "ties") for _ in range(2))
    kw = dict(block_size=8, rule=rule, limit=limit, normalise="sum")
    due = torch.tensor([1, 0, 0, 0, 1, 1], dtype=torch.int32, device=device)
    new = run(reference, "cpu", scores, heat, lens, S, shares, **kw)
    got = run(fn, device, scores, heat, lens, S, shares, due=due, **kw)
    for now, fresh, old in zip(got, new, (torch.tensor(-77), torch.tensor(-77), heat), strict=True):
        kept = [1, 2]
        assert torch.equal(now[kept], old.expand_as(fresh)[kept].to(now.dtype))
        rest = [0, 3, 4, 5]
        assert torch.allclose(now[rest].float(), fresh[rest].float())


@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_refuses_what_has_no_meaning(home):
    fn, device = {p.id: p.values for p in homes("select")}.get(home, (reference, "cpu"))
    some = torch.rand(1, 1, 4)
    for shares, kw, message in (
        ((1, 1, 1, 0), dict(rule="best"), "rule must be one of"),
        ((1, 1, 0, 1), dict(rule="mass", limit=0.5), "how many of query_blocks"),
        ((1, 1, 1, 0), dict(rule="mass", limit=1.5), "has no limit 1.5"),
        ((1, 1, 1, 0), dict(rule="margin", limit=-1.0), "has no limit -1.0"),
        ((1, 1, 1, 0), dict(rule="threshold", limit=float("nan")), "has no limit nan"),
    ):
        with pytest.raises(ValueError, match=message):
            run(fn, device, some, some, [25], 3, shares, block_size=8, normalise="none", **kw)
