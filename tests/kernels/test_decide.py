"""decide: every home against the reference, bit for bit but for scores and heat."""

import dataclasses

import pytest
import torch

from csrc_free_kernels import launch
from csrc_free_kernels.reference.decide import decide as reference
from tests.helpers.homes import homes, poison
from tests.helpers.pools import Pools, assert_same, make_pools
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
C, STEP = 8, 7

# name: score, Hkv, G, D, slots, S, (sink, recent, query, agnostic), seq_lens, normalise, dtype
CASES = {
    "one-token": ("mean", 1, 1, 64, 3, 2, (1, 1, 0, 0), [1], "sum", FP32),
    "mean": ("mean", 2, 4, 64, 9, 6, (1, 2, 2, 1), [100, 0, 97, 9], "sum", FP32),
    "mean-all-fit": ("mean", 2, 3, 80, 7, 6, (1, 2, 2, 1), [48, 41, 8, 0], "softmax", FP16),
    "mean-one-slot-short": ("mean", 1, 2, 64, 6, 6, (1, 2, 2, 1), [200, 199], "sum", FP32),
    "mean-many": ("mean", 1, 7, 64, 30, 20, (1, 3, 8, 6), [1201, 700], "sum", BF16),
    "mean-kept-heat": ("mean", 1, 2, 96, 12, 11, (0, 1, 3, 5), [240, 96], "none", FP32),
    "windows": ("windows", 2, 4, 64, 9, 7, (1, 1, 3, 2), [101, 0, 64, 3], "sum", FP32),
    "windows-many": ("windows", 1, 5, 64, 20, 16, (1, 2, 9, 4), [800, 613], "sum", BF16),
    "minmax": ("minmax", 2, 4, 64, 9, 6, (1, 2, 2, 1), [100, 0, 97, 9], "softmax", FP32),
    "minmax-many": ("minmax", 1, 8, 128, 20, 16, (1, 2, 9, 4), [900, 613], "softmax", BF16),
    "minmax-pages": ("minmax-pages", 2, 4, 64, 9, 6, (1, 2, 2, 1), [100, 0, 97, 9], "softmax", FP32),
    "given": ("given", 2, 4, 64, 9, 6, (1, 2, 2, 1), [100, 0, 97, 9], "sum", FP32),
    "given-query-only": ("given", 1, 1, 64, 9, 6, (1, 2, 3, 0), [200, 111], "none", FP32),
    "none-heat-only": ("none", 1, 1, 64, 9, 6, (1, 2, 0, 3), [200, 111], "none", FP32),
    "streaming": ("none", 2, 4, 64, 7, 6, (1, 4, 0, 0), [100, 0, 33, 80], "none", FP32),
    "full": ("none", 1, 4, 64, 30, 29, (0, 1, 0, 0), [200, 17], "none", FP32),
}
# As above; rule, limit.
RULED = {
    "mean-mass": ("mean-many", "mass", 0.04),
    "mean-threshold": ("mean", "threshold", 0.12),
    "windows-mass": ("windows-many", "mass", 0.04),
    "minmax-margin": ("minmax-many", "margin", 0.3),
    "given-scored": ("given", "scored", 0.0),
}
# A million tokens in blocks of 64 have as many blocks.
LONG = ("given", 1, 1, 8, 70, 64, (1, 16, 24, 23), [16384 * C - 3], "sum", FP32)
WIDTHS = {"mean": 1, "windows": 4, "minmax": 2, "minmax-pages": 8}


@dataclasses.dataclass
class World:
    """What a step reads and writes, on the CPU."""

    pools: Pools
    q: torch.Tensor | None
    summary: torch.Tensor | None
    heat: torch.Tensor | None
    scores: torch.Tensor | None
    width: int
    kw: dict

    def given(self, scores: torch.Tensor) -> "World":
        """The same step with scores that the caller brings."""
        return dataclasses.replace(self, scores=scores, q=None, summary=None, kw=self.kw | {"score": "given"})


def build(
    case: str | tuple, *, resident: float = 0.6, ties: bool = False, tail_resident: bool = True
) -> World:
    found = case if isinstance(case, tuple) else CASES.get(case, LONG)
    score, heads, group, dim, slots, width, shares, seq_lens, normalise, dtype = found
    pools = make_pools(
        heads, dim, C, seq_lens, slots=slots, dtype=dtype, resident=resident, tail_resident=tail_resident,
        step=STEP,
    )  # fmt: skip
    rows, blocks = pools.host_table.shape
    names = ("sink_blocks", "recent_blocks", "query_blocks", "agnostic_blocks")
    kw = dict(zip(names, shares, strict=True)) | {
        "score": score.removesuffix("-pages"), "softmax_scale": dim**-0.5, "block_size": C,
        "heat_decay": 0.75, "normalise": normalise,
    }  # fmt: skip
    exists = torch.arange(blocks) < -(-pools.seq_lens[:, None] // C)
    heat = scores = q = summary = None
    if shares[3] or normalise != "none":
        heat = torch.rand(rows, heads, blocks)
        heat = ((heat * 4).round() / 4 if ties else heat).masked_fill(~exists[:, None], torch.nan)
    if score == "given":
        scores = torch.rand(rows, heads, blocks)
        scores = ((scores * 4).round() / 4 if ties else scores).masked_fill(~exists[:, None], torch.nan)
    if score in WIDTHS:
        q = torch.randn(rows, heads * group, dim).to(dtype)
        summary = summaries(pools, score, heads, dim, seq_lens, dtype)
    return World(pools, q, summary, heat, scores, width, kw)


def summaries(pools, score, heads, dim, seq_lens, dtype) -> torch.Tensor:
    """Random summaries of what is finished, NaN elsewhere."""
    width = WIDTHS[score]
    summary = torch.full((len(pools.host), heads, width, dim), torch.nan, dtype=dtype)
    unit = C if score.startswith("minmax") else C // width
    for b, seq_len in enumerate(seq_lens):
        for u in range(seq_len // unit):
            if score.startswith("minmax"):
                pairs = torch.randn(heads, width // 2, 2, dim).sort(dim=2, descending=True).values
                summary[pools.host_table[b, u]] = pairs.flatten(1, 2).to(dtype)
            else:
                summary[pools.host_table[b, u // width], :, u % width] = torch.randn(heads, dim).to(dtype)
    return summary


def run(fn, device, world: World, *, lists=None, **more):
    """Returns pools after the step, exact outputs, the load list as a sorted list of pairs, scores and heat."""
    wide = torch.float64 if world.q is not None and world.q.dtype == torch.float64 else FP32
    pools = world.pools.copy(device)
    (rows, blocks), heads = pools.host_table.shape, pools.slot_of.shape[1]

    def move(t):
        return None if t is None else t.to(device, copy=True)

    more = {name: move(x) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    listed = more.get("open_groups")
    if listed is not None:  # what is scored are the candidates
        blocks = listed.shape[2] * more["group_blocks"]
    heat, scores, logits, arrivals = move(world.heat), move(world.scores), None, None
    if world.summary is not None:
        logits = poison(rows, world.q.shape[1], blocks * world.summary.shape[2], dtype=wide, device=device)
        arrivals = torch.zeros(rows, heads, dtype=torch.int32, device=device)
        scores = poison(rows, heads, blocks, dtype=wide, device=device)
    selected, hits, misses = (
        poison(rows, heads, world.width, dtype=torch.int32, device=device) for _ in range(3)
    )
    count = poison(rows, heads, dtype=torch.int32, device=device)
    if lists is not None:
        selected, count = (move(t) for t in lists)
    load_src, load_dst, load_at = (
        poison(rows * heads * world.width + 2, dtype=torch.int32, device=device) for _ in range(3)
    )
    load_count = torch.full((1,), 2, dtype=torch.int32, device=device)  # what `append` or others listed stays
    counters = torch.arange(rows * heads * 5, device=device).view(rows, heads, 5) * 2**33
    fn(
        move(world.q), move(world.summary), heat, pools.seq_lens, pools.host_table, pools.slot_of,
        pools.block_in, pools.last_used, pools.slot_base, pools.slot_count, pools.step, logits, arrivals,
        scores, selected, count, hits, misses, load_src, load_dst, load_at, load_count, counters,
        **world.kw, **more,
    )  # fmt: skip
    assert arrivals is None or not arrivals.any(), "the counters are left at zero for the next call"
    num = int(load_count)
    for part in (load_src, load_dst, load_at):
        assert (part[:2] == -77).all() and (part[num:] == -77).all(), "written outside the list"
    pairs = sorted(zip(*(part[2:num].tolist() for part in (load_src, load_dst, load_at)), strict=True))
    exact = [t.cpu() for t in (selected, count, hits, misses, counters)]
    return pools.copy("cpu"), exact, pairs, *(None if t is None else t.cpu() for t in (scores, heat))


def check(fn, device, world: World):
    """Scores by the tolerance rule; the rest equals the reference's result for the scores that were found."""
    pools, exact, pairs, scores, heat = run(fn, device, world)
    if world.summary is not None:
        wide = dataclasses.replace(world, q=world.q.double(), summary=world.summary.double())
        truth = run(reference, "cpu", wide)[3]
        assert_close(scores, truth, run(reference, "cpu", world)[3], world.q.dtype)
        world = world.given(scores)
    want = run(reference, "cpu", world)
    assert_same(pools, want[0])
    for got, expected in zip(exact, want[1], strict=True):
        assert torch.equal(got, expected)
    assert pairs == want[2]
    if heat is not None:
        exists = ~torch.isnan(world.heat)
        assert torch.equal(torch.isnan(heat), ~exists)
        assert_close(heat[exists], want[4][exists].double(), want[4][exists], FP32)
    return want


@pytest.mark.parametrize("resident", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_matches_reference(fn, device, case, resident):
    check(fn, device, build(case, resident=resident))


@pytest.mark.parametrize("ruled", RULED)
@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_rules(fn, device, ruled):
    """Fewer blocks than the budget where the rule says so, and only those are hits, misses and loads."""
    case, rule, limit = RULED[ruled]
    world = build(case)
    world.kw |= {"rule": rule, "limit": limit}
    want = check(fn, device, world)
    selected, count = want[1][:2]
    assert torch.equal((selected >= 0).sum(-1).int(), count)
    assert rule == "scored" or (count[world.pools.seq_lens > C * world.width] < world.width).any()


@pytest.mark.parametrize("case", ["mean", "windows", "minmax", "given"])
@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_rows_that_are_not_due(home, case):
    """They resolve the list they had, are not scored, and keep their heat; the others are as without."""
    fn, device = {p.id: p.values for p in homes("decide")}.get(home, (reference, "cpu"))
    world = build(case)
    _, (lists, count, *_), _, _, _ = run(reference, "cpu", world)
    earlier = dataclasses.replace(world, pools=world.pools.copy("cpu"))
    earlier.summary = None if world.summary is None else torch.full_like(world.summary, torch.nan)
    due = torch.tensor([0] * len(world.pools.seq_lens), dtype=torch.int32, device=device)
    got = run(fn, device, earlier, lists=(lists, count), due=due)
    assert torch.equal(got[1][0], lists) and torch.equal(got[1][1], count)
    want = run(reference, "cpu", world.given(torch.zeros_like(got[3])), lists=(lists, count), due=due.cpu())
    assert_same(got[0], want[0])
    for x, y in zip(got[1], want[1], strict=True):
        assert torch.equal(x, y)
    assert got[2] == want[2]
    assert torch.equal(got[4].nan_to_num(-5.0), world.heat.nan_to_num(-5.0))
    due = torch.tensor([1] * len(due), dtype=torch.int32, device=device)
    assert run(fn, device, world, due=due)[2] == run(fn, device, world)[2]


@pytest.mark.parametrize("case", ["given", "given-query-only", "none-heat-only", "mean"])
@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_ties(fn, device, case):
    check(fn, device, build(case, ties=True))


@pytest.mark.parametrize("use", [{"num_warps": 1, "programs": 2}, {"num_warps": 8, "programs": 9}])
@pytest.mark.parametrize("case", ["mean-many", "windows-many", "minmax-many"])
def test_launches_of_the_table(case, use):
    """Few programs score several tiles each, few warps pool in several tiles: the same result."""
    fn, device = homes("decide")[0].values
    world = build(case)
    pairs, blocks = world.pools.slot_base.numel(), world.pools.host_table.shape[1]
    features = {"blocks": 1 << (blocks - 1).bit_length()}
    with launch.candidate("decide", torch.device(device), pairs, features, use):
        check(fn, device, world)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_long_row(fn, device, ties):
    check(fn, device, build("long", resident=0.01, ties=ties))


@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_tail_not_resident(fn, device):
    """The tail is a miss like any other: with `append` left out, nobody claimed a slot for it."""
    check(fn, device, build("mean", tail_resident=False))


@pytest.mark.parametrize("counts", [[0, 9, 3, 9], [9, 0, 0, 5], [200, 0, 0, 0], [1, 2, 9, 0]])
@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_slot_counts(fn, device, counts):
    """Rows own nothing, little, or more slots than a kernel looks at together."""
    world = build("mean", resident=0.0, tail_resident=False)
    pools = world.pools
    rows, heads = pools.slot_base.shape
    total = 1 + heads * sum(counts)
    pools.pool = torch.full((total, pools.pool.shape[1]), torch.nan)
    pools.block_in = torch.full((total,), -1, dtype=torch.int32)
    pools.last_used = torch.zeros(total, dtype=torch.int32)
    pools.slot_count.copy_(torch.tensor(counts)[:, None].expand(rows, heads))
    pools.slot_base.copy_((pools.slot_count.flatten().cumsum(0).view(rows, heads) - pools.slot_count) + 1)
    for b, count in enumerate(counts):
        blocks = -(-int(pools.seq_lens[b]) // C)
        for h in range(heads):
            held = torch.randperm(blocks)[: max(count - 2, 0)]
            slots = torch.randperm(count)[: len(held)] + pools.slot_base[b, h]
            pools.slot_of[b, h, held], pools.block_in[slots] = slots.int(), held.int()
            pools.last_used[slots] = torch.randint(0, STEP, (len(held),)).int()
    check(fn, device, world)


@pytest.mark.parametrize(("fn", "device"), homes("decide"))
def test_step_after_step(fn, device):
    """Tables, heat and counters of one step are the next one's; after a few steps nothing has drifted."""
    world = build("mean")
    for step in range(3):
        world.q = torch.randn_like(world.q)
        want = check(fn, device, world)
        world.pools, world.heat = want[0], want[4]
        world.pools.step.fill_(STEP + step + 1)


@pytest.mark.parametrize("home", ["reference", "triton", "numba"])
def test_refuses_what_it_cannot_do(home):
    fn, device = {p.id: p.values for p in homes("decide")}.get(home, (reference, "cpu"))
    world = build("given")
    with pytest.raises(ValueError, match="score must be"):
        run(fn, device, dataclasses.replace(world, kw=world.kw | {"score": "best"}))
    with pytest.raises(ValueError, match="need heat"):
        run(fn, device, dataclasses.replace(world, heat=None))
    with pytest.raises(ValueError, match="need block_scores"):
        run(fn, device, dataclasses.replace(world, kw=world.kw | {"score": "none"}))
