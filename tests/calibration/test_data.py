"""Text into windows, and places that can be written."""

import os

import pytest
import torch

from rheo_offload.calibration.data import cut
from rheo_offload.calibration.run import check_out
from rheo_offload.errors import CalibrationError


class Words:
    """A tokenizer whose tokens are numbers in the text."""

    def __init__(self, start):
        self.bos_token_id = start

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(count):
    return " ".join(map(str, range(10, 10 + count)))


def test_windows_are_disjoint_and_the_last_two_are_held_out():
    windows = cut(numbers(43), Words(None), context=10, most=99)
    parts = [*windows.fit, windows.stop, windows.score]
    assert torch.equal(torch.cat(parts), torch.arange(10, 50)) and windows.tokens == 40
    assert len(windows.fit) == 2


def test_every_window_opens_with_the_start_token():
    windows = cut(numbers(43), Words(1), context=10, most=4)
    parts = [*windows.fit, windows.stop, windows.score]
    assert [p[0].item() for p in parts] == [1] * 4 and {len(p) for p in parts} == {10}
    assert torch.equal(torch.cat([p[1:] for p in parts]), torch.arange(10, 46))


def test_too_little_text_is_refused():
    with pytest.raises(CalibrationError, match="the text has 26 tokens; 3 windows of --context 10 need 27"):
        cut(numbers(26), Words(1), context=10, most=99)


def test_a_place_without_permission_is_refused(tmp_path, monkeypatch):
    check_out(str(tmp_path / "side.safetensors"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CalibrationError, match="no permission"):
        check_out(str(tmp_path / "side.safetensors"))
