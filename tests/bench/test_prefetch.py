"""The replay of prefetch policies: small cases by hand, plain LRU against the runtime's rule, Belady as the bound."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.prefetch import Geometry, Phase, Traffic, belady, capacity_slots, replay, warm_blocks
from bench.prefetch_plot import FIGURE, _points
from bench.prefetch_policies import POLICIES, Guesses, phases_of, query_blocks, select_by, worth_of
from bench.prefetch_suite import SELECTIONS, Case, replay_all, selection_rows
from bench.prefetch_time import Machine, exposed_ms
from bench.recorded import Recording
from bench.schema import read_rows
from csrc_free_kernels.reference.append import append
from csrc_free_kernels.reference.resolve import resolve

STILL = Geometry(block_size=1000, sink_blocks=1, recent_blocks=1, start_tokens=8500)
"""Blocks 0 (sink) and 8 (tail) are forced and the tail never moves."""


def still(*steps: str) -> np.ndarray:
    """Steps that select sink, tail and the blocks named by the digits."""
    return np.array([sorted({0, 8, *map(int, step)}) for step in steps])


def run(ids: np.ndarray, *phases: Phase, capacity: int = 5, worth: np.ndarray | None = None) -> Traffic:
    warm = np.array([0, 8])
    return replay(ids, STILL, capacity=capacity, num_blocks=9, warm=warm, phases=phases, worth=worth)


def wanted(*steps: str) -> list[np.ndarray]:
    return [np.array([int(c) for c in step], dtype=np.int64) for step in steps]


# ---- by hand -----------------------------------------------------------------------------------------------


def test_lru_evicts_the_oldest_and_the_lower_id():
    # slots: sink, tail and three more. Step 2 misses 4 and evicts 1 (as old as 2, lower id); step 3 misses 1 and
    # evicts 2 (oldest); step 4 misses 2.
    traffic = run(still("12", "23", "34", "14", "24"))
    assert traffic.demand.tolist() == [2, 1, 1, 1, 1]
    assert traffic.total == 6


def test_belady_evicts_what_is_needed_last():
    # After 1, 2, 3 the first eviction (for 4) takes 3, which never comes back; then everything is resident.
    ids = still("12", "23", "24", "14", "24")
    assert run(ids, worth=belady(ids, 9)).demand.tolist() == [2, 1, 1, 0, 0]
    assert run(ids).demand.tolist() == [2, 1, 1, 1, 0]


def test_worth_decides_who_stays():
    ids = still("12", "23", "14", "12")
    worth = np.array([[0, 0, 0, 0, 0, 0, 0, 0, 0]] * 4)
    worth[2, 2], worth[2, 3] = 0, 1  # in step 2 block 4 takes the place of 2, although 3 is as old
    assert run(ids, worth=worth).demand.tolist() == [2, 1, 1, 1]
    worth[2, 2], worth[2, 3] = 1, 0
    assert run(ids, worth=worth).demand.tolist() == [2, 1, 1, 0]


def test_step_window_spares_what_was_just_selected():
    ids = still("12", "34", "12")
    free = run(ids, Phase(wanted=wanted("12", "34", "12")), capacity=7)
    assert free.demand.tolist() == [0, 0, 0]
    assert free.early["step"].tolist() == [2, 2, 0] and free.useful == 4
    # Five slots: one is free after "12", so 3 comes early and 4 on demand, in the place of 1. Then 2 is wanted and
    # resident, 3 and 4 were just selected: there is no victim for 1.
    tight = run(ids, Phase(wanted=wanted("12", "34", "12")), capacity=5)
    assert tight.early["step"].tolist() == [2, 1, 0]
    assert tight.demand.tolist() == [0, 1, 1]


def test_limit_counts_absent_blocks_only():
    ids = still("12", "13", "14")
    traffic = run(ids, Phase(wanted=wanted("", "2134", "3214"), limit=1), capacity=9)
    assert traffic.early["step"].tolist() == [0, 1, 1]
    assert traffic.demand.tolist() == [2, 0, 0]
    assert traffic.useful == 2


def test_layer_window_may_evict_what_was_just_selected_but_not_what_is_wanted():
    ids = still("12", "34", "12")
    traffic = run(ids, Phase(wanted=wanted("", "34", "56"), window="layer"), capacity=5)
    # step 1: one slot is free, 1 goes; 3 and 4 come early. Step 2: 5 and 6 take the places of 2 and 3 in vain, and 1
    # and 2 are fetched on demand.
    assert traffic.early["layer"].tolist() == [0, 2, 2]
    assert traffic.demand.tolist() == [2, 0, 2]
    assert traffic.useful == 2 and traffic.total == 8


def test_wrong_guess_that_is_evicted_is_not_useful():
    ids = still("12", "34", "56", "17", "17")
    traffic = run(ids, Phase(wanted=wanted("", "7", "", "", ""), limit=1), capacity=5)
    assert traffic.early["step"].tolist() == [0, 1, 0, 0, 0] and traffic.useful == 0


def test_sink_and_tail_stay_whatever_is_wanted():
    traffic = run(still("12", "12"), Phase(wanted=wanted("", "34567"), window="layer"), capacity=5)
    assert traffic.early["layer"].tolist() == [0, 3]


def test_a_new_tail_takes_a_slot_and_costs_nothing():
    geometry = Geometry(block_size=4, sink_blocks=1, recent_blocks=1, start_tokens=7)
    ids = np.array([[0, 1], [0, 2], [0, 2], [0, 2], [0, 2], [0, 3]])  # tokens 8, 9, ... 13
    traffic = replay(ids, geometry, capacity=3, num_blocks=4, warm=np.array([0, 1]))
    assert traffic.demand.sum() == 0


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        run(still("1234"), capacity=4)


def test_warm_blocks_are_forced_then_hottest():
    order = np.array([3, 8, 5, 0, 1, 2])
    geometry = Geometry(block_size=1000, sink_blocks=1, recent_blocks=2, start_tokens=9000)
    assert warm_blocks(geometry, order, 6).tolist() == [0, 7, 8, 3, 5]
    assert [capacity_slots(64, r) for r in (1.0, 1.25, 1.5, 2.0)] == [65, 80, 96, 128]


# ---- against the runtime's rule, and the bound -------------------------------------------------------------


def random_ids(seed: int, steps: int, geometry: Geometry, budget: int, num_blocks: int) -> np.ndarray:
    """Selections that drift: hot blocks come back often, the sink and the recent blocks are always there."""
    rng = np.random.default_rng(seed)
    ids = []
    for t in range(steps):
        tail = geometry.tail(t)
        forced = {*range(geometry.sink_blocks), *range(tail - geometry.recent_blocks + 1, tail + 1)}
        rest = [b for b in range(tail) if b not in forced]
        weight = np.array([1 / (1 + (b * 7 + t // 3) % num_blocks) for b in rest])
        more = rng.choice(rest, budget - len(forced), replace=False, p=weight / weight.sum())
        ids.append(sorted(forced | {int(b) for b in more}))
    return np.array(ids)


def by_the_runtime(ids: np.ndarray, geometry: Geometry, capacity: int, num_blocks: int, warm) -> list[int]:
    """Loads per step of the reference `append` and `resolve`."""

    def int32(*shape: int, fill: int = 0) -> torch.Tensor:
        return torch.full(shape, fill, dtype=torch.int32)

    slot_of, block_in = int32(1, 1, num_blocks, fill=-1), int32(capacity + 1, fill=-1)
    for slot, block in enumerate(warm.tolist(), start=1):
        slot_of[0, 0, block], block_in[slot] = slot, block
    pool, host = (
        torch.zeros(2, capacity + 1, geometry.block_size, 1),
        torch.zeros(2, num_blocks, 1, geometry.block_size, 1),
    )
    table, step = torch.arange(num_blocks, dtype=torch.int32)[None], int32(1)
    tables = (slot_of, block_in, int32(capacity + 1), int32(1, 1, fill=1), int32(1, 1, fill=capacity), step)
    count, width, loads = int32(1), ids.shape[1], []
    new = torch.zeros(1, 1, 1)
    for t, chosen in enumerate(ids):
        step += 1
        seq_lens = int32(1, fill=geometry.start_tokens + t + 1)
        append(
            new,
            new,
            seq_lens,
            table,
            *host,
            *pool,
            *tables,
            None,
            count,
            sink_blocks=geometry.sink_blocks,
            summary_kind="none",
        )
        resolve(
            torch.from_numpy(chosen).int()[None, None],
            int32(1, 1, fill=width),
            seq_lens,
            table,
            *tables,
            int32(1, 1, width),
            int32(1, 1, width),
            int32(width),
            int32(width),
            int32(width),
            count,
            torch.zeros(1, 1, 5, dtype=torch.int64),
            block_size=geometry.block_size,
            sink_blocks=geometry.sink_blocks,
            recent_blocks=geometry.recent_blocks,
        )
        loads.append(int(count))
    return loads


@pytest.mark.parametrize("capacity", [9, 11, 14])
def test_lru_is_the_runtimes_own_rule(capacity):
    geometry = Geometry(block_size=4, sink_blocks=1, recent_blocks=2, start_tokens=80)
    ids = random_ids(capacity, 60, geometry, budget=8, num_blocks=35)
    warm = warm_blocks(geometry, np.arange(20)[::-1], capacity)
    traffic = replay(ids, geometry, capacity=capacity, num_blocks=35, warm=warm)
    loads = by_the_runtime(ids, geometry, capacity, 35, warm)
    assert traffic.demand.tolist() == loads
    assert sum(loads) > 50


@pytest.mark.parametrize("seed", range(3))
def test_nothing_moves_fewer_blocks_than_belady(seed):
    geometry = Geometry(block_size=4, sink_blocks=1, recent_blocks=2, start_tokens=80)
    ids = random_ids(seed, 50, geometry, budget=8, num_blocks=33)
    warm = warm_blocks(geometry, np.arange(20)[::-1], 10)

    def total(*phases: Phase, worth: np.ndarray | None = None) -> int:
        found = replay(ids, geometry, capacity=10, num_blocks=33, warm=warm, phases=phases, worth=worth)
        return found.total

    best = total(worth=belady(ids, 33))
    assert best <= total(worth=np.random.default_rng(seed).random((50, 33)))
    assert best < total()
    assert best <= total(Phase(wanted=list(ids)))
    assert best <= total(Phase(wanted=list(ids), window="layer"))
    assert best <= total(Phase(wanted=[ids[max(0, t - 1)][::-1] for t in range(50)], limit=2))


@pytest.mark.parametrize("seed", range(4))
def test_belady_is_the_least_of_all_schedules(seed):
    rng = np.random.default_rng(seed)
    ids = still(*("".join(map(str, sorted(rng.choice(7, 2, replace=False) + 1))) for _ in range(7)))

    @cache
    def least(t: int, resident: frozenset[int]) -> int:
        if t == len(ids):
            return 0
        missing = set(ids[t].tolist()) - resident
        keep = [b for b in resident if b not in ids[t]]
        room = 5 - ids.shape[1]
        kept = [keep] if len(keep) <= room else combinations(keep, room)
        return len(missing) + min(least(t + 1, frozenset([*ids[t].tolist(), *k])) for k in kept)

    assert run(ids, worth=belady(ids, 9)).total == least(0, frozenset([0, 8]))


# ---- the policies ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> tuple[Recording, dict[str, np.ndarray]]:
    """Two layers of one text: 24 steps, 8 of 20 blocks."""
    rng = np.random.default_rng(3)
    meta = {
        "format": 1, "model": "made-up", "method": "mean_key", "start_tokens": 18 * 16, "block_size": 16,
        "sink_blocks": 1, "recent_blocks": 2, "query_blocks": 3, "agnostic_blocks": 2, "heat_decay": 0.9,
        "streams": [["text", 0, 0], ["text", 4, 0]],
    }  # fmt: skip
    logits = np.cumsum(rng.normal(size=(2, 24, 20)), axis=1).astype(np.float32)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    closed = np.arange(20) < ((18 * 16 + 1 + np.arange(24)) // 16)[:, None]
    scores = np.where(closed, scores, -np.inf).astype(np.float32)
    ahead = np.where(closed, scores[:, np.r_[0, :23]], -np.inf).astype(np.float32)
    heat = np.where(np.arange(20) < 18, rng.random((2, 20)), 0).astype(np.float32)
    blank = Recording(
        base=np.zeros((2, 24, 8), np.uint16), early=np.zeros((2, 24, 2), np.uint16),
        start_order=np.argsort(-heat, axis=1)[:, :18].astype(np.uint16), meta=meta,
    )  # fmt: skip
    base = select_by(blank, scores, scores, heat)
    early = np.stack([[_hottest(blank, scores, heat, s, t) for t in range(24)] for s in range(2)])
    recording = Recording(
        base=base.astype(np.uint16), early=early.astype(np.uint16), start_order=blank.start_order, meta=meta
    )
    mass = np.where(closed, scores, 0).astype(np.float32)
    return recording, {"scores": scores, "ahead1": ahead, "ahead6": scores, "mass": mass, "start_heat": heat}


def _hottest(recording: Recording, scores: np.ndarray, heat: np.ndarray, stream: int, step: int) -> list[int]:
    """The two hottest blocks that are not forced, ahead of a step."""
    hot = heat[stream].astype(np.float64)
    for t in range(step):
        share = np.where(np.isfinite(scores[stream, t]), scores[stream, t], 0)
        hot = 0.9 * hot + share / share.sum()
    tail = (18 * 16 + step) // 16
    return sorted(sorted(range(1, tail - 1), key=lambda b: (-hot[b], b))[:2])


def test_certain_blocks_are_always_selected(recorded):
    recording, _ = recorded
    for s, t in np.ndindex(2, 24):
        assert set(recording.early[s, t]) < set(recording.base[s, t])


def test_policies_want_what_they_say(recorded):
    recording, scores = recorded
    guesses = Guesses.of(recording, scores)

    def wanted_by(policy: str, stream: int, step: int) -> list[int]:
        (phase,) = phases_of(policy, stream, recording, guesses)
        return phase.wanted[step].tolist()

    own = scores["scores"]
    for s, t in np.ndindex(2, 24):
        tail = (18 * 16 + t) // 16
        assert wanted_by("agnostic", s, t) == recording.early[s, t].tolist()
        assert wanted_by("ahead-6", s, t) == recording.base[s, t].tolist(), "a perfect guess is the selection"
        ranked = sorted(range(1, tail - 1), key=lambda b: (-own[s, max(0, t - 1), b], b))
        assert wanted_by("runner-up-4", s, t) == ranked
        assert sorted(wanted_by("hottest-1", s, t)[:2]) == recording.early[s, t].tolist()
        wide = phases_of("agnostic-wide", s, recording, guesses)[0].wanted[t]
        by_heat = set(recording.base[s, t]) - {0, tail - 1, tail} - set(query_blocks(recording, own[s])[t])
        assert len(wide) == 5 and by_heat < set(wide), (
            "a block chosen for its heat is among the hottest A + Q"
        )
        assert (
            wanted_by("ahead-1-half", s, t)
            == sorted(range(1, tail - 1), key=lambda b: (-scores["ahead1"][s, t, b], b))[:1]
        )
    assert np.array_equal(worth_of("evict-lowest", 1, recording, guesses), own[1])
    hot = worth_of("evict-coldest", 1, recording, guesses)
    for t in range(23):  # what is kept after a step is the heat that the next one chooses by
        last = (18 * 16 + t + 1) // 16 - 1
        assert (
            sorted(sorted(range(1, last), key=lambda b: (-hot[t, b], b))[:2])
            == recording.early[1, t + 1].tolist()
        )
    assert worth_of("lru", 0, recording, guesses) is worth_of("ahead-1", 0, recording, guesses) is None
    assert wanted_by("previous-layer", 1, 5) == recording.base[0, 5].tolist()
    assert wanted_by("previous-layer", 0, 5) == []
    both = phases_of("runner-up-1+ahead-1", 1, recording, guesses)
    assert [phase.window for phase in both] == ["step", "layer"]
    assert phases_of("runner-up-4", 0, recording, guesses)[0].limit == 4
    (limited,) = phases_of("ahead-1-limit-1", 0, recording, guesses)
    assert limited.limit == 1 and limited.window == "layer" and len(limited.wanted[7]) == 3
    assert limited.wanted[7][:1].tolist() == wanted_by("ahead-1-half", 0, 7)
    assert phases_of("runner-up-4", 0, recording, None) is None
    assert phases_of("ahead-2", 0, recording, guesses) is None
    with pytest.raises(ValueError, match="unknown policy"):
        phases_of("magic", 0, recording, guesses)


def test_scores_of_another_recording_are_refused(recorded):
    recording, scores = recorded
    with pytest.raises(ValueError, match="another recording"):
        Guesses.of(recording, scores | {"scores": scores["scores"][::-1].copy()})


def test_lost_mass_is_that_of_the_blocks_that_were_late(recorded):
    recording, scores = recorded
    case = Case(name="tiny", recording=recording, scores=scores, skip=0)
    found = {what: values for what, values, _ in selection_rows(case, [1.0], Guesses.of(recording, scores))}
    traffic = replay_all(case, "lru", 1.0, None)
    lost = [scores["mass"][s, t, traffic[s].missed[t]].sum() for s in range(2) for t in range(24)]
    late = found["c1.0-late"]
    assert sum(lost) > 0
    assert late["captured_mass_recorded"] - late["captured_mass"] == pytest.approx(np.mean(lost), rel=1e-5)
    assert late["lost_mass_max"] == pytest.approx(max(lost), rel=1e-5)
    assert found["select-step-old"]["captured_mass"] < late["captured_mass_recorded"]
    assert 0.5 < found["select-step-old"]["same_blocks"] < 1
    other = recording.base[0].astype(int)  # of the layer before the only stream that has one
    expected = np.take_along_axis(scores["mass"][1], other, 1).sum(1).mean()
    assert found["select-previous-layer"]["captured_mass"] == pytest.approx(expected, rel=1e-5)


# ---- the time model ----------------------------------------------------------------------------------------


def test_exposed_time_by_hand(recorded):
    recording, _ = recorded
    machine = Machine(
        num_layers=2,
        num_kv_heads=1,
        block_bytes=1000,
        link_bytes_per_s=1e6,
        attention_bytes_per_s=4e6,
        rest_of_layer_s=1e-3,
    )  # a block takes 1 ms on the link, attention over 8 blocks 2 ms, the rest of a layer 1 ms

    def traffic(demand: int = 0, step: int = 0, layer: int = 0) -> list[Traffic]:
        def every(n: int) -> np.ndarray:
            return np.full(24, n)

        return [Traffic(demand=every(demand), early={"step": every(step), "layer": every(layer)})] * 2

    def ms(**blocks: int) -> float:
        exposed, moved = exposed_ms(traffic(**blocks), recording, rows=1, machine=machine, skip=4)
        assert exposed.shape == (20,) and (moved == 2000 * sum(blocks.values())).all()
        assert np.allclose(exposed, exposed[0])
        return float(exposed[0])

    assert ms(demand=1) == 0  # 1 ms under 1.75 ms of attention over 7 hits
    assert ms(demand=3) == pytest.approx(2 * (3 - 1.25))
    assert ms(step=3) == 0  # 3 ms a layer are idle
    assert ms(step=4) == pytest.approx(2 * 1)
    assert ms(layer=4) == pytest.approx(2 * 1)
    assert ms(demand=1, step=2) == pytest.approx(2 * (2 - 1.75))
    assert ms(layer=2, step=2) == pytest.approx(2 * 1)


# ---- the command -------------------------------------------------------------------------------------------


def test_command_writes_rows_for_every_policy(recorded, tmp_path, capsys):
    recording, scores = recorded
    np.savez(tmp_path / "tiny.scores.npz", **scores)
    (tmp_path / "traces").mkdir()
    recording.save(tmp_path / "traces" / "tiny.npz")
    arguments = ["prefetch", str(tmp_path / "traces"), "--capacity", "1.0,1.5", "--skip", "4"]
    assert main([*arguments, "--scores", str(tmp_path), "--out", str(tmp_path / "all")]) == 0
    rows = read_rows(tmp_path / "all" / "rows.csv")
    links = {r["case_id"]: r["p50"] for r in rows if r["metric"] == "link_blocks_per_step"}
    known = {*POLICIES, *SELECTIONS} - {"ahead-2"}
    assert set(links) == {f"tiny-c{ratio}-{policy}" for ratio in (1.0, 1.5) for policy in known}
    for ratio in ("1.0", "1.5"):
        mine = {
            f"tiny-c{ratio}-{policy}": links[f"tiny-c{ratio}-{policy}"]
            for policy in POLICIES
            if policy in known
        }
        assert links[f"tiny-c{ratio}-late"] == links[f"tiny-c{ratio}-lru"]
        assert min(mine.values()) == mine[f"tiny-c{ratio}-belady"]
    extra = {r["case_id"]: r["p50"] for r in rows if r["metric"] == "extra_bytes"}
    assert extra["tiny-c1.5-lru"] == 0 and extra["tiny-c1.5-belady"] <= 0
    mass = {r["baseline"]: r["p50"] for r in rows if r["metric"] == "captured_mass"}
    assert set(mass) == set(SELECTIONS)
    demand = {r["case_id"]: r["p50"] for r in rows if r["metric"] == "demand_misses_per_step"}
    assert demand["tiny-c1.5-late"] == demand["tiny-c1.5-perfect"] == 0 < demand["tiny-c1.5-lru"]
    assert "capacity 1.5 x budget" in capsys.readouterr().out
    assert (tmp_path / "all" / "env.json").exists()
    points = _points(tmp_path / "all")
    assert set(points) == {"tiny"} and set(points["tiny"]["evict-coldest"]) == {"1.0", "1.5"}
    assert points["tiny"]["lru"]["1.5"]["link_blocks_per_step"] == links["tiny-c1.5-lru"]
    assert (tmp_path / "all" / FIGURE).exists() == _has_matplotlib()

    assert main([*arguments, "--out", str(tmp_path / "few")]) == 0
    policies = {r["baseline"] for r in read_rows(tmp_path / "few" / "rows.csv")}
    assert policies == {
        "lru",
        "belady",
        "perfect",
        "agnostic",
        "previous-layer",
        "late",
        "select-previous-layer",
    }


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policies", "magic"], "unknown policies magic"),
        (["--capacity", "0.5"], "at least 1.0"),
        (["--skip", "24"], "leaves nothing"),
    ],
)
def test_requests_without_sense_are_refused(recorded, tmp_path, capsys, more, message):
    recorded[0].save(tmp_path / "tiny.npz")
    assert main(["prefetch", str(tmp_path / "tiny.npz"), "--out", str(tmp_path / "x"), *more]) == 2
    assert message in capsys.readouterr().err


def test_folder_without_recordings_is_refused(tmp_path, capsys):
    assert main(["prefetch", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert f"no recordings in {tmp_path}" in capsys.readouterr().err
