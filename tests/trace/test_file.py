"""The file of a trace: what was written is what is read, and everything else is refused with the reason."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from rheo_offload.errors import TraceError
from rheo_offload.trace.file import Trace, config_hash
from tests.helpers.tiny_model import tiny_config
from tests.trace.conftest import made

ARRAYS = ("ids", "lens", "misses", "start_used", "start_order")


def test_a_file_gives_back_what_was_saved(run, tmp_path: Path):
    trace, _ = run
    trace.save(tmp_path / "run.trace")  # no suffix is put behind it
    found = Trace.load(tmp_path / "run.trace")
    assert found.meta == trace.meta
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(found, name), getattr(trace, name))
        assert getattr(found, name).dtype == getattr(trace, name).dtype


def test_wrap_around_of_deltas(tmp_path: Path):
    trace = made(["12", "7", "12345", ""])
    trace.save(tmp_path / "t.npz")
    np.testing.assert_array_equal(Trace.load(tmp_path / "t.npz").ids, trace.ids)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(run, tmp_path: Path, share: float):
    whole, cut = tmp_path / "whole.npz", tmp_path / "cut.npz"
    run[0].save(whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(TraceError, match="truncated"):
        Trace.load(cut)


def test_a_damaged_file_is_refused(run, tmp_path: Path):
    file = tmp_path / "t.npz"
    run[0].save(file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(TraceError):
        Trace.load(file)


def test_what_is_no_trace_is_refused(tmp_path: Path):
    (tmp_path / "text.npz").write_text("no trace at all")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "other.npz", "array.npy"):
        with pytest.raises(TraceError, match="no trace") as refusal:
            Trace.load(tmp_path / name)
        assert "pickle" not in str(refusal.value), "advice of numpy that helps nobody here"
    with pytest.raises(TraceError, match="cannot read.*No such file"):
        Trace.load(tmp_path / "nowhere.npz")
    with pytest.raises(TraceError, match="cannot write.*No such file"):
        made(["1"]).save(tmp_path / "nowhere" / "t.npz")


def altered(file: Path, **changes: object) -> Path:
    """Rewrite a saved trace; a change of None takes a member away, others go into its description."""
    with np.load(file) as held:
        members = dict(held)
    meta = json.loads(str(members["meta"]))
    for name, value in changes.items():
        if name in members and value is None:
            del members[name]
        elif name in members:
            members[name] = value
        elif value is None:
            del meta[name]
        else:
            meta[name] = value
    np.savez(file, **{**members, "meta": np.array(json.dumps(meta))})
    return file


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"misses": None}, "lacks misses"),
        ({"block_budget": 9}, "ids is"),
        ({"capacity": None}, "does not say capacity"),
        ({"lens": np.array([[8000], [8001]], dtype=np.int32)}, "blocks that its rows do not have"),
        ({"start_order": np.full((1, 1, 1, 10), 10, np.uint16)}, "blocks that its rows do not have"),
        ({"misses": np.zeros((1, 1, 1, 2))}, "misses holds float64"),
        ({"block_size": 0}, "no sensible block_size"),
        ({"capacity": "five"}, "no sensible capacity"),
        ({"lens": np.array([[9501]], dtype=np.int32)}, "lens is \\(1, 1\\), not \\(2, 1\\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, changes, reason):
    made(["1", "2"]).save(tmp_path / "t.npz")
    with pytest.raises(TraceError, match=reason):
        Trace.load(altered(tmp_path / "t.npz", **changes))


def test_a_trace_without_steps_is_refused():
    trace = made(["1"])
    with pytest.raises(TraceError, match="no step"):
        replace(trace, ids=trace.ids[..., :0, :], lens=trace.lens[:0], misses=trace.misses[..., :0])


def test_a_trace_of_another_model_is_refused(tmp_path: Path):
    config = tiny_config("llama")
    trace = made(["1"], config_hash=config_hash(config))
    trace.check_config(config)
    with pytest.raises(TraceError, match="trace of made-up .* not of a llama model"):
        trace.check_config(tiny_config("llama", hidden_size=128))
    # the same model, however it was loaded
    config.save_pretrained(tmp_path)
    trace.check_config(AutoConfig.from_pretrained(tmp_path, attn_implementation="eager", dtype="bfloat16"))
