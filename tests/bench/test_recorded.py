"""Recordings of block ids: the file, the mapping to another geometry, and the recorder that makes them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from bench import record, record_suite
from bench.prefetch_policies import Guesses
from bench.record import Recorder
from bench.record_suite import policy_of
from bench.recorded import Recording
from bench.schema import Environment
from bench.texts import TEXTS
from rheo_offload.types import Policy

ENVIRONMENT = Environment(**{name: name for name in Environment.__dataclass_fields__})
TRACES = sorted((Path(__file__).parents[2] / "bench" / "traces").glob("*.npz"))


def made_up(streams: int = 5, steps: int = 20, budget: int = 6) -> Recording:
    """A recording whose ids are random but well formed."""
    rng = np.random.default_rng(0)
    base = np.sort(rng.random((streams, steps, 32)).argsort(-1)[..., :budget], axis=-1).astype(np.uint16)
    order = np.tile(np.arange(30, dtype=np.uint16), (streams, 1))
    meta = {
        "format": 1, "model": "made-up", "method": "mean_key", "start_tokens": 30 * 16, "block_size": 16,
        "sink_blocks": 1, "recent_blocks": 1, "query_blocks": 2, "agnostic_blocks": 2, "heat_decay": 0.9,
        "streams": [["text", s, 0] for s in range(streams)],
    }  # fmt: skip
    return Recording(base=base, early=base[..., 1:3], start_order=order, meta=meta)


def test_file_gives_back_what_was_saved(tmp_path):
    recording = made_up()
    recording.save(tmp_path / "a.npz")
    again = Recording.load(tmp_path / "a.npz")
    for name in ("base", "early", "start_order"):
        assert np.array_equal(getattr(again, name), getattr(recording, name))
        assert getattr(again, name).dtype == np.uint16
    assert again.meta == recording.meta


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "b.npz", base=np.zeros(3))
    with pytest.raises(ValueError, match="not a recording"):
        Recording.load(tmp_path / "b.npz")
    (tmp_path / "text.npz").write_text("no recording at all")
    with pytest.raises(ValueError, match="not a recording"):
        Recording.load(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="cannot read .*No such file"):
        Recording.load(tmp_path / "nowhere.npz")
    recording = made_up()
    with pytest.raises(ValueError, match="format 2"):
        Recording(
            base=recording.base, early=recording.early, start_order=recording.start_order,
            meta=recording.meta | {"format": 2},
        )  # fmt: skip
    with pytest.raises(ValueError, match="names 4 streams"):
        Recording(
            base=recording.base, early=recording.early, start_order=recording.start_order,
            meta=recording.meta | {"streams": recording.meta["streams"][:4]},
        )  # fmt: skip


def test_mapping_is_the_same_everywhere():
    recording = made_up()
    assert recording.stream_map(2, 3, 2).tolist() == [[[0, 4, 1], [3, 0, 1]], [[3, 3, 1], [1, 3, 1]]]
    assert recording.times(4, 2)[0].tolist() == [16, 9, 2, 9]


def test_ids_follow_the_index_map():
    recording = made_up()
    ids, early = recording.ids(3, 4, 5, 7), recording.early_ids(3, 4, 5, 7)
    assert ids.shape == (7, 3, 5, 4, 6) and ids.dtype == np.int32
    assert early.shape == (7, 3, 5, 4, 2)
    stream, times = recording.stream_map(3, 4, 5), recording.times(5, 7)
    for t, layer, row, head in np.ndindex(7, 3, 5, 4):
        expected = recording.base[stream[layer, row, head], times[t, row]]
        assert np.array_equal(ids[t, layer, row, head], expected)
        assert set(early[t, layer, row, head]) <= set(expected)
    assert np.array_equal(recording.seq_lens(5, 7), 481 + times)
    assert ids.max() < recording.context_blocks == 32


def test_more_rows_leave_the_first_as_they_are():
    recording = made_up()
    assert np.array_equal(recording.ids(3, 4, 2, 5), recording.ids(3, 4, 6, 5)[:, :, :2])


def test_short_runs_play_forward_and_long_ones_turn_round():
    recording = made_up()
    assert (np.diff(recording.times(50, 10), axis=0) == 1).all()
    times = recording.times(50, 70)
    assert (np.abs(np.diff(times, axis=0)) == 1).all()
    assert times.min() == 0 and times.max() == 19
    assert len(set(times[0].tolist())) > 10, "rows are in lockstep"


# ---- the recorder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=16, query_pre_attn_scalar=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"], initializer_range=0.5,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def policy(query_blocks: int, agnostic_blocks: int) -> Policy:
    return Policy(
        block_budget=2 + query_blocks + agnostic_blocks, sink_blocks=1, recent_blocks=1,
        query_blocks=query_blocks, agnostic_blocks=agnostic_blocks, heat_decay=0.9,
    )  # fmt: skip


def test_recorder_selects_and_knows_the_certain_blocks_a_step_early(model, monkeypatch):
    monkeypatch.setattr(record, "AHEAD", (0, 1))
    ids = torch.randint(0, 64, (1, 128 + 20), generator=torch.Generator().manual_seed(1))
    recorder = Recorder(model, block_size=8, max_blocks=19)
    prefix = recorder.read(ids[:, :128], chunk_tokens=64)
    made = recorder.decode(prefix, policy(2, 3), ids[:, 128:])
    again = recorder.decode(prefix, policy(2, 3), ids[:, 128:])
    assert list(made) == [0, 2]
    for layer, other in zip(made.values(), again.values(), strict=True):
        assert layer["selected"].shape == (2, 20, 7) and layer["early"].shape == (2, 20, 3)
        assert (np.diff(layer["selected"].astype(int)) > 0).all()
        for h, t in np.ndindex(2, 20):
            assert set(layer["early"][h, t]) < set(layer["selected"][h, t])
        # A query guessed from a layer's own hidden state is its query.
        np.testing.assert_allclose(layer["ahead0"], layer["scores"], rtol=1e-4, atol=1e-6)
        assert np.array_equal(layer["selected"], other["selected"]), "the prefix was changed"
    assert not np.allclose(made[2]["ahead1"], made[2]["scores"], rtol=1e-2, atol=1e-4, equal_nan=True)
    np.testing.assert_allclose(made[2]["mass"].sum(-1), 1.0, rtol=1e-5)


def test_recorder_scores_blocks_that_closed_since_the_prompt(model):
    """Queries and keys of the first layer do not depend on what is attended, so a longer prompt tells the truth."""
    ids = torch.randint(0, 64, (1, 128 + 20), generator=torch.Generator().manual_seed(3))
    recorder = Recorder(model, block_size=8, max_blocks=19)
    made = recorder.decode(recorder.read(ids[:, :128]), policy(2, 3), ids[:, 128:])[0]["scores"]
    truth = recorder.decode(recorder.read(ids[:, :144]), policy(2, 3), ids[:, 144:])[0]["scores"]
    assert np.isfinite(truth[:, 0, 17]).all()
    np.testing.assert_allclose(made[:, 16:], truth, rtol=1e-4, atol=1e-6)


def test_recorder_with_a_full_budget_is_the_stock_model(model):
    ids = torch.randint(0, 64, (1, 64 + 12), generator=torch.Generator().manual_seed(2))
    outputs: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda *call: outputs.append(call[2][:, -1]))
    recorder = Recorder(model, block_size=16, max_blocks=5)
    recorder.decode(recorder.read(ids[:, :64]), policy(2, 1), ids[:, 64:])
    ours, outputs = torch.stack(outputs[1:]), []
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    outputs.clear()
    with torch.no_grad():
        model.model(input_ids=ids[:, :64], past_key_values=cache, use_cache=True)
        stock = [
            model.model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).last_hidden_state[
                :, -1
            ]
            for t in range(64, 76)
        ]
    hook.remove()
    torch.testing.assert_close(ours, torch.stack(stock), rtol=1e-4, atol=1e-4)


def test_recorder_wants_whole_blocks(model):
    recorder = Recorder(model, block_size=16, max_blocks=5)
    with pytest.raises(ValueError, match="whole blocks"):
        recorder.read(torch.zeros(1, 60, dtype=torch.int64))


def test_suite_writes_recordings_that_their_scores_lead_to(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(TEXTS, "letters", lambda: "the quick brown fox jumps over the lazy dog, " * 10)
    monkeypatch.setitem(TEXTS, "short", lambda: "too short")
    arguments = {
        "model_name": "tiny", "policies": ["s32-heat", "s32-noheat"], "prompt_tokens": 320, "steps": 12,
        "block_size": 8, "environment": ENVIRONMENT, "folder": tmp_path, "scores_folder": tmp_path,
    }  # fmt: skip
    written = record_suite.record(model, Letters(), texts=["letters"], **arguments)
    assert [path.name for path in written] == ["tiny-s32-heat.npz", "tiny-s32-noheat.npz"]
    for path, agnostic in zip(written, (12, 0), strict=True):
        recording = Recording.load(path)
        assert recording.base.shape == (4, 12, 32) and recording.early.shape == (4, 12, agnostic)
        assert recording.meta["streams"] == [["letters", layer, head] for layer in (0, 2) for head in (0, 1)]
        assert (
            recording.meta["environment"]["commit"] == "commit" and len(recording.meta["token_sha256"]) == 1
        )
        with np.load(tmp_path / f"{path.stem}.scores.npz") as scores:
            guesses = Guesses.of(
                recording, {name: scores[name] for name in scores.files}
            )  # raises if they do not
        assert set(guesses.ahead) == {1, 2, 6}
    with pytest.raises(ValueError, match="332 are needed"):
        record_suite.record(model, Letters(), texts=["short"], **arguments)


class Letters:
    """A tokenizer of letters."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 64 for c in text]}


@pytest.mark.parametrize("name", [name for name in TEXTS if not name.startswith("prose")])
def test_texts_are_long_and_the_same_twice(name):
    text = TEXTS[name]()
    assert len(text) > 70_000 and TEXTS[name]() == text


# ---- the files that are committed --------------------------------------------------------------------------


def test_traces_are_small():
    assert TRACES
    assert sum(path.stat().st_size for path in TRACES) < 3_000_000


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_traces_are_well_formed(path):
    recording = Recording.load(path)
    name = "-".join(path.stem.split("-")[-2:])
    assert {key: recording.meta[key] for key in ("query_blocks", "agnostic_blocks")} == {
        key: getattr(policy_of(name), key) for key in ("query_blocks", "agnostic_blocks")
    }
    assert recording.recorded_steps >= 192 and recording.streams >= 9
    base = recording.base.astype(int)
    assert (np.diff(base) > 0).all() and base.max() < recording.context_blocks
    assert (base[..., 0] == 0).all(), "the sink is always selected"
    held = np.zeros((*base.shape[:2], recording.context_blocks), dtype=bool)
    np.put_along_axis(held, base, True, axis=2)
    assert np.take_along_axis(held, recording.early.astype(int), 2).all()
    tail = (recording.seq_lens(1, 1)[0, 0] - 1) // recording.meta["block_size"]
    assert held[:, recording.times(1, 1)[0, 0], tail].all()
