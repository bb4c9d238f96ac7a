"""`sample` and `sample_greedy`: the same token in every home, the right distribution, and what cannot be sampled."""

import pytest
import torch
import triton
import triton.language as tl

from csrc_free_kernels.cpu import sample as numba_home
from csrc_free_kernels.gpu import sample as triton_home
from csrc_free_kernels.reference import sample as truth
from csrc_free_kernels.reference.sample_greedy import MAX_VOCABULARY, SCRATCH_WORDS
from csrc_free_kernels.reference.sample_greedy import sample_greedy as greedy_truth
from tests.helpers.homes import DEVICE, homes, poison

# extreme temperatures overflow on purpose, and numpy (the interpreter) says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

INF, NAN = float("inf"), float("nan")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SAMPLE, GREEDY = homes("sample"), homes("sample_greedy")
EVERY_SAMPLE = [pytest.param(truth.sample, "cpu", id="reference"), *SAMPLE]
EVERY_GREEDY = [pytest.param(greedy_truth, "cpu", id="reference"), *GREEDY]
BY_INSTRUCTION = [pytest.param(truth.sample, "cpu", id="reference"), SAMPLE[1]]  # what is fast without a GPU

# known answers of Philox-4x32-10 (Random123, kat_vectors): counter, key, words
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# temperature, top_k, top_p of eight rows
RULES = (
    [0.0, 0.5, 1.0, 1.0, 2.0, 1.0, 0.7, 1.3],
    [0, 0, 50, 0, 50, 1, 99, 5000],
    [1, 1, 1, 0.9, 0.8, 0.5, 0.95, 0],
)


def run(op, device, logits, rules, positions, seeds, bad=None):
    """Sample with the op; rules are lists of temperature, top_k and top_p."""
    rows = logits.shape[0]
    temperature, top_k, top_p = (
        torch.tensor(rule, dtype=dtype, device=device)
        for rule, dtype in zip(rules, (FP32, torch.int32, FP32), strict=True)
    )
    tokens = poison(rows, dtype=torch.int64, device=device)
    bad = torch.zeros(rows, dtype=torch.int32, device=device) if bad is None else bad.to(device)
    scratch = poison(rows + 1, SCRATCH_WORDS, dtype=torch.int64, device=device)
    at = (torch.as_tensor(positions, device=device), torch.as_tensor(seeds, device=device))
    op(logits.to(device), at[0], temperature, top_k, top_p, at[1], scratch, tokens, bad)
    return tokens.cpu(), bad.cpu()


def run_greedy(op, device, logits):
    tokens = poison(logits.shape[0], dtype=torch.int64, device=device)
    bad = torch.zeros(logits.shape[0], dtype=torch.int32, device=device)
    op(
        logits.to(device),
        poison(logits.shape[0], SCRATCH_WORDS, dtype=torch.int64, device=device),
        tokens,
        bad,
    )
    return tokens.cpu(), bad.cpu()


def one_rule(rows, temperature=1.0, top_k=0, top_p=1.0):
    return [temperature] * rows, [top_k] * rows, [top_p] * rows


# ---- random numbers and weights have the same bits everywhere -----------------------------------------------------


@triton.jit
def philox_kernel(words, out):
    c0, c1, c2, c3 = triton_home.philox(
        tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3), tl.load(words + 4),
        tl.load(words + 5),
    )  # fmt: skip
    tl.store(out, c0)
    tl.store(out + 1, c1)
    tl.store(out + 2, c2)
    tl.store(out + 3, c3)


@triton.jit
def uniform_kernel(seed, position, out):
    tl.store(out, triton_home.uniform_53(tl.load(seed), tl.load(position)))


@triton.jit
def weigh_kernel(x, top, temperature, out, N: tl.constexpr):
    o_x = tl.arange(0, N)
    b_key = triton_home.sortable(tl.load(top))
    tl.store(out + o_x, triton_home.weigh(tl.load(x + o_x), b_key, tl.load(temperature)))


def longs(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "want"), PHILOX)
def test_philox_known_answers(counter, key, want):
    words = truth.philox(tuple(longs(c) for c in counter), (longs(key[0]), longs(key[1])))
    assert tuple(int(w) for w in words) == want
    assert tuple(numba_home.philox(*counter, *key)) == want
    out = longs(0, 0, 0, 0).to(DEVICE)
    philox_kernel[(1,)](longs(*counter, *key).to(DEVICE), out)
    assert tuple(out.tolist()) == want


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (-1, 5), (2**62 + 12345, 2**40 + 7), (-(2**63), 131071)]
)
def test_random_bits_agree(seed, position):
    want = truth.uniform_53(longs(seed), longs(position))
    assert 0 <= int(want) < 2**53
    assert numba_home.uniform_53(seed, position) == int(want)
    out = longs(0).to(DEVICE)
    uniform_kernel[(1,)](longs(seed).to(DEVICE), longs(position).to(DEVICE), out)
    assert torch.equal(out.cpu(), want)


def test_every_bit_of_seed_and_position_counts():
    one = torch.ones(64, dtype=torch.int64) << torch.arange(64)
    seen = torch.cat([truth.uniform_53(one, one * 0), truth.uniform_53(one * 0, one)])
    assert len(set(seen.tolist())) == 128


@pytest.mark.parametrize("temperature", [1.0, 0.37, 7.5, 1e-4, 1e-42])
def test_weights_agree_and_are_exponentials(temperature):
    top = torch.tensor([3.25])
    x = top - torch.cat(
        [torch.rand(1000) * 40 * temperature, torch.zeros(1), torch.rand(22) * 1e-6, top * INF]
    )
    t = torch.tensor([temperature])
    want = truth.weigh(x, top[0], t)
    scale = numba_home.LOG2_E / t.numpy()[0] if temperature > 1e-38 else numba_home.LARGEST_SCALE
    assert [numba_home.weight_of(v, top.numpy()[0], scale) for v in x.numpy()] == want.tolist()
    out = torch.full_like(want, -77).to(DEVICE)
    weigh_kernel[(1,)](x.to(DEVICE), top.to(DEVICE), t.to(DEVICE), out, N=1024, enable_fp_fusion=False)
    assert torch.equal(out.cpu(), want)
    exact = 2.0**40 * ((x.double() - 3.25) / t.double()).exp()
    assert (
        (want - exact).abs() <= 1.0 + 1e-5 * exact
    ).all()  # an exponent of 40 in fp32, then cut to an integer
    assert want[1000] == 2**40 and want[-1] == 0


# ---- the same token in every home ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "V", "ties"),
    [(FP32, 4400, False), (BF16, 5000, True), (FP16, 100, True), (FP32, 1, False)],
    ids=["fp32-two-parts", "bf16-ties", "fp16-small", "one-token"],
)
@pytest.mark.parametrize(("op", "device"), SAMPLE)
def test_the_token_of_the_reference(op, device, dtype, V, ties):
    logits = (torch.randn(8, V + 3) * 3).to(dtype)
    if ties:
        logits = (logits * 2).round() / 2
    logits[1::2, 4096:] += 5.0  # draws from the second part too
    logits = logits[:, :V]  # strided rows
    at = (torch.arange(8) * 1000, longs(1, -5, 2**62, 7, 8, 9, 10, 11))
    want, _ = run(truth.sample, "cpu", logits, RULES, *at)
    got, bad = run(op, device, logits, RULES, *at)
    assert torch.equal(got, want)
    assert not bad.any()
    assert want[0] == logits[0].float().argmax()
    assert V < 4096 or ((want >= 4096).any() and (want < 4096).any())


@pytest.mark.parametrize(("op", "device"), [SAMPLE[1]])
def test_many_tokens_of_the_reference(op, device):
    logits = torch.randn(64, 300) * 2
    rules = [row * 8 for row in RULES]
    for position in range(0, 200, 20):
        at = (torch.full((64,), position), torch.arange(64))
        assert torch.equal(
            run(op, device, logits, rules, *at)[0], run(truth.sample, "cpu", logits, rules, *at)[0]
        )


@pytest.mark.parametrize(("op", "device"), SAMPLE)
def test_extreme_rules(op, device):
    logits = torch.randn(8, 64)
    logits[3, :32] = -INF
    logits[4] *= 1e38
    logits = logits.bfloat16()
    rules = (
        [1e-42, 1e30, 1.0, 1.0, 1.0, 1e-6, NAN, 1.0],
        [0, 0, 64, 40, 2, -3, 0, 2**31 - 1],
        [1e-30] + [0.999999] * 7,
    )
    at = (torch.arange(8), torch.arange(8))
    want = run(truth.sample, "cpu", logits, rules, *at)[0]
    assert torch.equal(run(op, device, logits, rules, *at)[0], want)
    assert want[0] == logits[0].argmax() and want[6] == logits[6].argmax() and want[3] >= 32


@pytest.mark.parametrize(("op", "device"), EVERY_SAMPLE)
def test_mass_that_reaches_p_exactly_is_enough(op, device):
    """Weights of 1/2, 1/4, 1/4 (the scale is 1 at this temperature): p = 1/2 keeps the first, a bit more keeps all."""
    logits = torch.tensor([[-1.0, 0.0, -1.0]], dtype=BF16).repeat(8, 1)
    seen = [
        set(
            run(op, device, logits, one_rule(8, truth.LOG2_E, 0, p), torch.arange(8), torch.arange(8))[
                0
            ].tolist()
        )
        for p in (0.5, 0.50001)
    ]
    assert seen == [{1}, {0, 1, 2}]


def test_the_ends_of_the_random_range():
    """No random number gives a token of weight 0."""
    row = torch.tensor([-INF, 1.0, -INF, 0.0, -INF])
    weight = truth.kept_weights(row, torch.tensor(1.0), 0, torch.tensor(1.0))
    for bits, want in ((0, 1), (2**53 - 1, 3)):
        assert numba_home.draw(row.numpy(), 0, 1, *torch.tensor([1.0]).numpy(), 0, 1.0, bits) == want
        assert (weight.cumsum(0) <= truth.pick(longs(bits), weight.sum())).sum() == want


@pytest.mark.parametrize(("op", "device"), SAMPLE)
def test_neither_row_nor_batch_matters(op, device):
    logits = torch.randn(1, 97, dtype=BF16).repeat(5, 1)
    logits[1] *= 0.5
    rules = one_rule(5, 0.9, 20, 0.95)
    at = (longs(41, 7, 41, 42, 41), longs(3, 3, 3, 3, 4))
    batch, _ = run(op, device, logits, rules, *at)
    alone = [
        run(op, device, logits[b : b + 1], one_rule(1, 0.9, 20, 0.95), at[0][b : b + 1], at[1][b : b + 1])[0]
        for b in (1, 4)
    ]
    assert torch.equal(batch[[1, 4]], torch.cat(alone))
    assert batch[0] == batch[2]
    order = longs(4, 2, 0, 1, 3)
    assert torch.equal(run(op, device, logits[order], rules, at[0][order], at[1][order])[0], batch[order])


# ---- the distribution ----------------------------------------------------------------------------------------------


def definition(logits, temperature, top_k, top_p):
    """Probabilities by sorting, in fp64: temperature, top-k, top-p of the rest, equal logits alike."""
    x = logits.double() / temperature
    if 0 < top_k < len(x):
        x = torch.where(x >= x.sort(descending=True).values[top_k - 1], x, -INF)
    p = x.softmax(0)
    above = torch.stack([p[x > v].sum() for v in x])
    p = torch.where((above < top_p) | (x == x.max()), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 10, 1.0), (1.5, 0, 0.8), (1.0, 20, 0.9)],
)
@pytest.mark.parametrize(("op", "device"), BY_INSTRUCTION)
def test_draws_follow_the_softmax(op, device, temperature, top_k, top_p):
    draws = 20000 if op is not truth.sample else 2000
    logits = torch.randn(40) * 1.5
    logits[7] = logits[3]
    want = definition(logits, temperature, top_k, top_p) * draws
    at = (torch.arange(draws), torch.full((draws,), 1234))
    rules = one_rule(draws, temperature, top_k, top_p)
    seen = run(op, device, logits.expand(draws, -1).contiguous(), rules, *at)[0].bincount(minlength=40)
    assert (seen[want == 0] == 0).all()
    likely = want >= 5
    rest = want[~likely].sum(), seen[~likely].sum()
    chi2 = ((seen - want)[likely] ** 2 / want[likely]).sum() + (rest[1] - rest[0]) ** 2 / rest[0].clamp(min=1)
    freedom = int(likely.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5
    assert chi2 > freedom - 4 * (2 * freedom) ** 0.5  # as random as it should be


@pytest.mark.parametrize("kind", ["random", "ties"])
def test_kept_set_is_the_definition(kind):
    for temperature, top_k, top_p in zip(*RULES, strict=True):
        logits = torch.randn(200) if kind == "random" else (torch.randn(200) * 2).round()
        want = definition(logits, temperature or 1.0, top_k, top_p)
        t = torch.tensor(temperature or 1.0)
        got = truth.kept_weights(logits, t, top_k, torch.tensor(float(top_p))).double()
        assert torch.equal(got > 0, want > 0)
        assert ((got / got.sum() - want).abs() < 1e-6).all()


def test_kept_set_is_that_of_transformers():
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for top_k, top_p in [(5, 0.5), (50, 0.9), (1, 0.9), (300, 0.3), (20, 0.999)]:
        logits = torch.randn(1, 500) * 2
        scores = TemperatureLogitsWarper(0.8)(None, logits)
        scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
        got = truth.kept_weights(logits[0], torch.tensor(0.8), top_k, torch.tensor(top_p)) > 0
        assert torch.equal(got, scores[0] > -INF)


# ---- greedy, and rows that cannot be sampled -----------------------------------------------------------------------


@pytest.mark.parametrize(("op", "device"), EVERY_GREEDY)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_greedy_takes_the_lowest_of_equals(op, device, dtype):
    logits = torch.full((6, 4200), -3.0)
    for row, ids in enumerate([(5, 4199), (4095, 4096), (0,), (4199,), (17, 18, 19)]):
        logits[row, list(ids)] = 2.5
    logits[5] = -0.0
    logits[5, 100] = 0.0
    tokens, bad = run_greedy(op, device, logits.to(dtype)[:, :4200])
    assert tokens.tolist() == [5, 4095, 0, 4199, 17, 0]
    assert not bad.any()


@pytest.mark.parametrize(("op", "device"), GREEDY)
def test_greedy_of_strided_rows(op, device):
    logits = torch.randn(3, 150)[:, :101]
    assert torch.equal(run_greedy(op, device, logits)[0], logits.argmax(-1))


def odd_rows():
    logits = torch.randn(6, 130)
    logits[0, 129] = NAN
    logits[1, 3] = INF
    logits[2] = -INF
    logits[3, 5:] = -INF
    logits[4, 0] = -NAN
    return logits


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("op", "device"), EVERY_GREEDY)
def test_greedy_flags_rows_that_cannot_be_sampled(op, device, dtype):
    logits = odd_rows().to(dtype)
    tokens, bad = run_greedy(op, device, logits)
    assert bad.tolist() == [1, 1, 1, 0, 1, 0]
    assert tokens.tolist() == [0, 0, 0, int(logits[3].argmax()), 0, int(logits[5].argmax())]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("op", "device"), EVERY_SAMPLE)
def test_sample_flags_rows_that_cannot_be_sampled(op, device, temperature):
    """The flag stays: it is 1 for a good row that was bad before."""
    logits = odd_rows()
    before = torch.tensor([0, 1, 0, 0, 0, 1], dtype=torch.int32)
    at = (torch.arange(6), torch.arange(6))
    tokens, bad = run(op, device, logits, one_rule(6, temperature, 30, 0.9), *at, bad=before)
    assert bad.tolist() == [1, 1, 1, 0, 1, 1]
    assert tokens[[0, 1, 2, 4]].tolist() == [0, 0, 0, 0]
    assert tokens[3] < 5


@pytest.mark.parametrize(("op", "device"), GREEDY)
def test_refused_logits(op, device):
    for logits, said in [
        (torch.zeros(2, 8, dtype=torch.float64), "float64"),
        (torch.zeros(8, 2).T, "contiguous"),
        (torch.zeros(2, 3, 4), r"\[2, 3, 4\]"),
        (torch.zeros(1, MAX_VOCABULARY + 1), str(MAX_VOCABULARY)),
    ]:
        with pytest.raises(ValueError, match=said):
            run_greedy(op, device, logits)


def test_refused_scratch():
    op = SAMPLE[0].values[0]
    row = torch.zeros(2, device=DEVICE)
    ids, flags = row.long(), row.int()
    for scratch in (None, torch.zeros(1, SCRATCH_WORDS, device=DEVICE), torch.zeros(2, 8, device=DEVICE)):
        with pytest.raises(ValueError, match=r"scratch must be int64 \[>= 2"):
            op(
                torch.zeros(2, 8, device=DEVICE),
                ids,
                row,
                flags,
                row,
                ids,
                scratch,
                ids.clone(),
                flags.clone(),
            )


# ---- on the device, captured ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("B", "V"), [(1, 128256), (64, 128256), (3, MAX_VOCABULARY)])
def test_captured_on_the_device(dtype, B, V):
    logits = (torch.randn(B, V) * 2).to(dtype)
    rules = [(rule * 9)[4 : 4 + B] for rule in RULES]
    positions, seeds = torch.arange(B) * 77, torch.arange(B) + 5
    want, _ = run(truth.sample, "cpu", logits, rules, positions, seeds)
    x, at, seed = logits.cuda(), positions.cuda(), seeds.cuda()
    temperature, top_p = (torch.tensor(rules[i], dtype=FP32).cuda() for i in (0, 2))
    top_k = torch.tensor(rules[1], dtype=torch.int32).cuda()
    scratch = poison(B, SCRATCH_WORDS, dtype=torch.int64, device="cuda")
    tokens, bad = (
        poison(B, dtype=torch.int64, device="cuda"),
        torch.zeros(B, dtype=torch.int32, device="cuda"),
    )
    greedy = torch.empty_like(tokens)

    def step():
        triton_home.sample(x, at, temperature, top_k, top_p, seed, scratch, tokens, bad)
        GREEDY[0].values[0](x, scratch, greedy, bad)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    tokens.fill_(-77)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens.cpu(), want)
    assert torch.equal(greedy.cpu(), logits.float().argmax(-1))
    assert not bad.any()
