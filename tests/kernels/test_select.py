"""select: ids bit for bit in every home, heat to tolerance, and the reference against its definition."""

import math

import pytest
import torch

from csrc_free_kernels.reference.select import select as reference
from tests.helpers.homes import homes, poison
from tests.helpers.tolerance import assert_close

INF, NAN = float("inf"), float("nan")

# name: Hkv, C, N, S, (sink, recent, query, agnostic), seq_lens, normalise
CASES = {
    "one-token": (1, 8, 4, 2, (1, 1, 0, 0), [1], "sum"),
    "all-fit": (2, 8, 6, 6, (1, 2, 2, 1), [48, 41, 8, 0], "sum"),
    "one-too-many": (2, 8, 7, 6, (1, 2, 2, 1), [56, 49, 48], "softmax"),
    "query-only": (2, 8, 40, 8, (1, 2, 5, 0), [320, 77, 0, 5], "none"),
    "agnostic-only": (2, 8, 40, 8, (1, 2, 0, 5), [320, 77], "sum"),
    "both": (2, 8, 50, 12, (1, 3, 4, 4), [400, 393, 0, 100, 97], "sum"),
    "both-softmax": (2, 8, 50, 12, (1, 3, 4, 4), [400, 393, 0, 100], "softmax"),
    "heat-kept": (1, 8, 50, 12, (1, 3, 4, 4), [399], "none"),
    "spare-places": (1, 8, 30, 11, (2, 1, 3, 2), [240, 90], "sum"),  # the four shares do not fill S
    "no-sink": (1, 8, 30, 7, (0, 1, 3, 3), [240, 90], "sum"),
    "takes-all-but-one": (1, 8, 13, 12, (1, 1, 5, 5), [104], "sum"),
    "large": (1, 64, 1500, 64, (1, 16, 24, 23), [96000, 40000], "sum"),
}


def random_scores(B, Hkv, N, C, seq_lens, kind):
    """Scores or heat with what they may hold; poison past the end of each row."""
    x = torch.rand(B, Hkv, N)
    if kind == "ties":
        x = (x * 4).round() / 4
    elif kind == "signed":
        x = (x - 0.5) * 20
    elif kind == "zeros":
        x = torch.where(x < 0.5, 0.0, -0.0)
    elif kind == "odd":
        x[torch.rand(B, Hkv, N) < 0.3] = NAN
        x[torch.rand(B, Hkv, N) < 0.3] = -INF
    elif kind == "nothing":
        x.fill_(-INF)
    for b, seq_len in enumerate(seq_lens):
        x[b, :, -(-seq_len // C) :] = 77.0
    return x


def run(fn, device, scores, heat, seq_lens, S, shares, **kw):
    """Returns (selected_blocks, num_selected, heat after)."""
    heads = next(t.shape[1] for t in (scores, heat, torch.empty(0, 1)) if t is not None)
    scores, heat = (t if t is None else t.clone().to(device) for t in (scores, heat))
    selected = poison(len(seq_lens), heads, S, dtype=torch.int32, device=device)
    count = poison(len(seq_lens), heads, dtype=torch.int32, device=device)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    names = ("sink_blocks", "recent_blocks", "query_blocks", "agnostic_blocks")
    fn(scores, heat, lens, selected, count, heat_decay=0.75, **dict(zip(names, shares, strict=True)), **kw)
    return selected.cpu(), count.cpu(), heat if heat is None else heat.cpu()


def check(fn, device, scores, heat, *args, **kw):
    wide = [t if t is None else t.double() for t in (scores, heat)]
    want, got = run(reference, "cpu", *wide, *args, **kw), run(fn, device, scores, heat, *args, **kw)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    if heat is not None:
        assert_close(got[2], want[2], run(reference, "cpu", scores, heat, *args, **kw)[2], torch.float32)


@pytest.mark.parametrize("kind", ["random", "ties", "signed", "zeros", "odd", "nothing"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("select"))
def test_matches_reference(fn, device, case, kind):
    Hkv, C, N, S, shares, seq_lens, normalise = CASES[case]
    scores = random_scores(len(seq_lens), Hkv, N, C, seq_lens, kind)
    if normalise == "sum" and kind == "signed":
        scores = scores.abs()  # "sum" is for probabilities: around zero a sum has no relative accuracy
    heat = random_scores(len(seq_lens), Hkv, N, C, seq_lens, "ties" if kind == "ties" else "random")
    check(fn, device, scores, heat, seq_lens, S, shares, block_size=C, normalise=normalise)


@pytest.mark.parametrize(("fn", "device"), homes("select"))
def test_streaming_needs_neither_scores_nor_heat(fn, device):
    got = run(fn, device, None, None, [0, 5, 24, 25, 80], 5, (1, 2, 0, 0), block_size=8, normalise="none")
    rows = [[-1] * 5, [0, -1, -1, -1, -1], [0, 1, 2, -1, -1], [0, 1, 2, 3, -1], [0, 8, 9, -1, -1]]
    assert got[0][:, 0].tolist() == rows
    assert got[1][:, 0].tolist() == [0, 1, 3, 4, 3]


@pytest.mark.parametrize(("fn", "device"), homes("select"))
def test_one_of_scores_and_heat_is_enough(fn, device):
    scores = random_scores(2, 1, 20, 8, [160, 90], "ties")
    check(fn, device, scores, None, [160, 90], 6, (1, 2, 3, 0), block_size=8, normalise="none")
    check(fn, device, None, scores, [160, 90], 6, (1, 2, 0, 3), block_size=8, normalise="none")


@pytest.mark.parametrize(("fn", "device"), homes("select"))
def test_strided_scores(fn, device):
    """Scores and heat may be views of wider buffers."""
    scores = random_scores(3, 4, 30, 8, [200, 0, 240], "ties")[::2, 1:3, :25]
    check(fn, device, scores, scores.clone(), [200, 160], 8, (1, 2, 3, 2), block_size=8, normalise="sum")


@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_refuses_what_it_cannot_do(home):
    fn, device = {p.id: p.values for p in homes("select")}.get(home, (reference, "cpu"))
    some, two = torch.rand(1, 1, 4), (1, 1, 0, 0)
    with pytest.raises(ValueError, match="normalise must be"):
        run(fn, device, some, some, [5], 3, two, block_size=8, normalise="mean")
    with pytest.raises(ValueError, match="need block_scores"):
        run(fn, device, None, some, [5], 3, (1, 1, 1, 0), block_size=8, normalise="none")
    with pytest.raises(ValueError, match="need block_scores"):
        run(fn, device, None, some, [5], 3, two, block_size=8, normalise="sum")
    with pytest.raises(ValueError, match="need heat"):
        run(fn, device, some, None, [5], 3, (1, 1, 0, 1), block_size=8, normalise="none")
    with pytest.raises(ValueError, match="need heat"):
        run(fn, device, some, None, [5], 3, two, block_size=8, normalise="softmax")


def definition(scores, heat, nb, S, shares, normalise):
    """One (row, head), as the contract reads: ids and the new heat of its blocks."""
    sink, recent, query, agnostic = shares
    if nb <= S:
        ids = list(range(nb))
    else:
        ids = [n for n in range(nb) if n < sink or n >= nb - recent]
        for values, count in ((scores, query), (heat, agnostic)):
            value = [-INF if math.isnan(x) else x for x in values]
            rest = sorted((n for n in range(nb) if n not in ids), key=lambda n, v=value: (-v[n], n))
            ids += rest[:count]
    finite = [n for n in range(nb) if math.isfinite(scores[n])]
    raised = {n: scores[n] if normalise == "sum" else math.exp(scores[n]) for n in finite}
    share = {n: x / (sum(raised.values()) or 1.0) for n, x in raised.items()}
    if normalise == "none":
        return sorted(ids), heat[:nb]
    return sorted(ids), [0.75 * heat[n] + share.get(n, 0.0) for n in range(nb)]


@pytest.mark.parametrize("kind", ["random", "ties", "signed", "zeros", "odd", "nothing"])
@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case, kind):
    Hkv, C, N, S, shares, seq_lens, normalise = CASES[case]
    scores = random_scores(len(seq_lens), Hkv, N, C, seq_lens, kind).double()
    heat = random_scores(len(seq_lens), Hkv, N, C, seq_lens, kind="ties").double()
    ids, count, new_heat = run(
        reference, "cpu", scores, heat, seq_lens, S, shares, block_size=C, normalise=normalise
    )
    for b, seq_len in enumerate(seq_lens):
        nb = -(-seq_len // C)
        for h in range(Hkv):
            want, want_heat = definition(scores[b, h].tolist(), heat[b, h].tolist(), nb, S, shares, normalise)
            assert ids[b, h].tolist() == want + [-1] * (S - len(want))
            assert int(count[b, h]) == len(want)
            assert new_heat[b, h, :nb].tolist() == pytest.approx(want_heat, rel=1e-12)
            assert torch.equal(new_heat[b, h, nb:], heat[b, h, nb:])
