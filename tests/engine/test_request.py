"""A request: what it refuses, when it ends, and its times."""

import pytest
import torch

from rheo_offload.engine.request import Request, State
from rheo_offload.execution.sampler import SamplingParams


def request(prompt=4, *, eos=(), on_token=None, **params):
    return Request(
        id="r",
        prompt_ids=torch.arange(prompt),
        params=SamplingParams(**params),
        eos_token_ids=eos,
        on_token=on_token,
    )


def test_a_new_request_waits():
    r = request(5, max_new_tokens=3)
    assert (r.state, r.row, r.computed_tokens, r.finish_reason) == (State.WAITING, None, 0, None)
    assert (r.prompt_tokens, r.prefill_tokens, r.total_tokens) == (5, 4, 8)
    assert not r.is_done and r.ttft_ms is None and r.itl_ms is None
    assert request(1).prefill_tokens == 0


@pytest.mark.parametrize("ids", [torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3), torch.zeros(3).int()])
def test_odd_prompts_are_refused(ids):
    with pytest.raises(ValueError, match=r"prompt_ids must be int64 \[tokens\] on the CPU"):
        Request(id="r", prompt_ids=ids)


@pytest.mark.parametrize(
    ("params", "reasons"),
    [
        ({}, [None, None, "stop"]),
        ({"stop_token_ids": (8,)}, [None, "stop"]),
        ({"ignore_eos": True}, [None] * 5 + ["length"]),
        ({"ignore_eos": True, "stop_token_ids": (9,)}, [None, None, "stop"]),
        ({"max_new_tokens": 2}, [None, "length"]),
        ({"max_new_tokens": 3}, [None, None, "stop"]),
    ],
)
def test_when_it_ends(params, reasons):
    r = request(eos=(9, 10), **({"max_new_tokens": 6} | params))
    got = []
    for token in (7, 8, 9, 10, 7, 7):
        got.append(r.add_token(token))
        if got[-1] is not None:
            break
    assert got == reasons
    assert r.output_ids == [7, 8, 9, 10, 7, 7][: len(got)]  # what ended it is part of the output


def test_tokens_are_streamed_after_they_were_added():
    seen = []
    r = request(on_token=lambda r, token: seen.append((token, list(r.output_ids))))
    r.add_token(3)
    r.add_token(5)
    assert seen == [(3, [3]), (5, [3, 5])]


def test_times():
    r = request()
    r.submitted_at = 10.0
    r.add_token(1, now=10.5)
    assert r.ttft_ms == pytest.approx(500) and r.itl_ms is None
    r.add_token(1, now=10.6)
    r.add_token(1, now=10.8)
    assert r.itl_ms == pytest.approx(150)
    assert r.token_times == [10.5, 10.6, 10.8]
