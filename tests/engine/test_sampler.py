"""The sampler: parameters that are refused, rows that keep their own rules, seeds, and a captured call."""

import pytest
import torch

from rheo_offload.execution.sampler import Sampler, SamplingParams
from rheo_offload.ops import kernels_for

CPU = torch.device("cpu")
WARM = SamplingParams(temperature=1.0, top_k=40, top_p=0.9, seed=11)


def sampler(rows=4, vocab=50, device=CPU):
    return Sampler(rows, vocab, device, kernels_for(device))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True]),
        ("top_k", [-1, 2**31, 1.5, None, True]),
        ("top_p", [0.0, -1, 1.01, float("nan"), "x"]),
        ("seed", [2**63, -(2**63) - 1, 1.0]),
        ("max_new_tokens", [0, -1, 2.0, None]),
        ("stop_token_ids", [[1, 2], (-1,), (1.0,), 5]),
    ],
)
def test_odd_parameters_are_refused(field, values):
    for value in values:
        with pytest.raises(ValueError, match=field if field != "top_p" or value != "x" else "must be"):
            SamplingParams(**{field: value})


def test_defaults_are_greedy():
    params = SamplingParams()
    assert params.greedy and params.top_k == 0 and params.top_p == 1.0
    assert not WARM.greedy
    assert SamplingParams(temperature=1, seed=-(2**63), stop_token_ids=(0, 5)).seed == -(2**63)


def test_an_impossible_sampler_is_refused():
    for rows, vocab in ((0, 10), (1, 0), (1, 262145)):
        with pytest.raises(ValueError, match="at least one row"):
            sampler(rows, vocab)


def test_each_row_has_its_own_rules():
    s = sampler()
    s.set_row(1, WARM)
    s.set_row(3, SamplingParams(temperature=0.5, seed=2**40))
    assert s.temperature.tolist() == [0, 1, 0, 0.5]
    assert s.top_k.tolist() == [0, 40, 0, 0]
    assert s.top_p.tolist() == pytest.approx([1, 0.9, 1, 1])
    assert s.seed.tolist() == [0, 11, 0, 2**40]
    logits, positions = torch.randn(4, 50), torch.arange(4) + 100
    tokens = s(logits, positions, greedy=False)
    assert tokens.data_ptr() == s.tokens.data_ptr()
    assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    alone = sampler(1)
    for row, params in ((1, WARM), (3, SamplingParams(temperature=0.5, seed=2**40))):
        alone.set_row(0, params)
        assert alone(logits[row : row + 1], positions[row : row + 1], greedy=False).item() == tokens[row]


def test_greedy_is_known_on_the_host():
    s = sampler()
    assert s.all_greedy(4)
    s.set_row(2, WARM)
    assert s.all_greedy(2) and not s.all_greedy(3)
    s.swap_rows(2, 0)
    assert not s.all_greedy(1)
    s.clear_row(0)
    assert s.all_greedy(4)
    logits = torch.randn(4, 50)
    assert torch.equal(s(logits, torch.arange(4), greedy=True), logits.argmax(-1))


def test_rows_swap_with_all_that_is_theirs():
    s = sampler()
    s.set_row(0, WARM)
    s.set_row(1, SamplingParams(temperature=2.0, top_k=3, top_p=0.5, seed=-4))
    s.tokens.copy_(torch.arange(4) + 5)
    s.bad[1] = 1
    s.swap_rows(0, 1)
    assert s.temperature.tolist() == [2, 1, 0, 0]
    assert s.top_k.tolist() == [3, 40, 0, 0]
    assert s.top_p.tolist() == pytest.approx([0.5, 0.9, 1, 1])
    assert s.seed.tolist() == [-4, 11, 0, 0]
    assert s.tokens.tolist() == [6, 5, 7, 8]
    assert s.bad.tolist() == [1, 0, 0, 0]
    assert s.params(1) == WARM and s.params(0).seed == -4


def test_a_missing_seed_comes_from_torch():
    def seeds():
        torch.manual_seed(5)
        s = sampler()
        for row in range(4):
            s.set_row(row, SamplingParams(temperature=1.0))
        return s.seed.tolist(), [s.params(row).seed for row in range(4)]

    first, known = seeds()
    assert first == known and len(set(first)) == 4
    assert seeds()[0] == first


def test_the_same_request_draws_the_same_tokens_in_any_row():
    logits = torch.randn(50)
    s = sampler()
    for row in range(4):
        s.set_row(row, WARM)
    seen = [
        s(logits.expand(4, -1).contiguous(), torch.full((4,), p), greedy=False).tolist() for p in range(20)
    ]
    assert all(len(set(tokens)) == 1 for tokens in seen)
    assert len({tokens[0] for tokens in seen}) > 3  # another position, another draw


def test_bad_rows_stay_marked_until_the_row_is_given_away():
    s = sampler()
    logits = torch.randn(4, 50)
    logits[2, 7] = float("nan")
    for greedy in (True, False):
        assert s(logits, torch.arange(4), greedy=greedy)[2] == 0
    s(torch.randn(3, 50), torch.arange(3), greedy=True)
    assert s.bad.tolist() == [0, 0, 1, 0]
    s.set_row(2, WARM)
    assert s.bad.tolist() == [0, 0, 0, 0]


def test_fewer_rows_than_the_batch():
    s = sampler()
    s.tokens.fill_(-77)
    s(torch.randn(2, 50), torch.arange(2), greedy=True)
    assert s.tokens[2:].tolist() == [-77, -77]


@pytest.mark.gpu
@pytest.mark.parametrize("greedy", [True, False])
def test_captured_calls_follow_the_rows(greedy):
    device = torch.device("cuda")
    s, host = sampler(8, 1000, device), sampler(8, 1000)
    logits, positions = torch.randn(8, 1000, device=device), torch.arange(8, device=device)
    s(logits, positions, greedy=greedy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        s(logits, positions, greedy=greedy)
    for turn in range(4):
        torch.cuda.set_sync_debug_mode("error")
        try:
            s.set_row(turn, SamplingParams(temperature=1.0, top_k=turn * 10, seed=turn))
            s.swap_rows(turn, 7)
            positions += 1
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        host.set_row(turn, SamplingParams(temperature=1.0, top_k=turn * 10, seed=turn))
        host.swap_rows(turn, 7)
        assert torch.equal(s.tokens.cpu(), host(logits.cpu(), positions.cpu(), greedy=greedy))
