"""Every policy by hand, against all schedules, ragged (LRU against the kernels: tests/bench/test_prefetch.py)."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest

from rheo_offload.trace.simulate import POLICIES, Outcome, Phase, simulate


def play(
    steps: list[str], policy: str, *, capacity: int = 5, used: str = "09", decay: float = 0.5
) -> Outcome:
    """Sink 0, tail 9, and the digits; three slots beyond those two. Blocks of `used` are resident, oldest first."""
    ids = [sorted({0, 9, *map(int, step)}) for step in steps]
    table = np.full((len(steps), max(map(len, ids))), -1)
    for t, blocks in enumerate(ids):
        table[t, : len(blocks)] = blocks
    start = np.zeros(10, dtype=np.int64)
    for rank, block in enumerate(used, start=1):
        start[int(block)] = rank
    return simulate(
        table, 9501 + np.arange(len(steps)), block_size=1000, sink_blocks=1, recent_blocks=1,
        capacity=capacity, start_used=start, policy=policy, heat_decay=decay,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "misses"),
    [
        # 1, 2, 3 fill the slots; 1 is used again. 4 then evicts who came first: 1 (whose use does not count).
        # Step 4 misses 1 and evicts 2; step 5 misses 2 and evicts 3.
        ("fifo", [1, 1, 1, 0, 1, 1, 1]),
        # 4 evicts the oldest use, 2; 1 is there; 2 evicts 3.
        ("lru", [1, 1, 1, 0, 1, 0, 1]),
    ],
)
def test_fifo_and_lru_differ_where_a_block_is_used_again(policy, misses):
    assert play(["1", "2", "3", "1", "4", "1", "2"], policy).demand.tolist() == misses


def test_lfu_keeps_what_was_selected_often():
    # 1 four times, 2 twice, 3 once: 4 evicts 3, where lru would take 2. 3 (now two) evicts 4 (one); for 4, 2 and 3 tie
    # at two and 2, used longest ago, leaves; so 2 is missed.
    steps = ["1", "1", "12", "2", "1", "3", "4", "3", "4", "2"]
    assert play(steps, "lfu").demand.tolist() == [1, 0, 1, 0, 0, 1, 1, 1, 1, 1]
    assert play(steps, "lru").demand.tolist() == [1, 0, 1, 0, 0, 1, 1, 0, 0, 1]


def test_lfu_counts_absences_too():
    # 4 evicts 1 (all at one, 1 is oldest); 1 comes back at two and evicts 2; then 5 takes 3 or 4, not 1.
    assert play(["1", "2", "3", "4", "1", "5", "1"], "lfu").demand.tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_heat_decays():
    # At decay 0.5, when 4 comes: 1 was selected at 0, 1, 2 (heat 1.75 at 2, 0.11 at 6), 2 at 5 (0.5), 3 at 4 (0.25), so
    # 1 leaves; for 1 (1.05 when it is back) 3 leaves, for 3 then 2, for 2 then 4.
    steps = ["1", "1", "1", "", "3", "2", "4", "1", "3", "2", "1"]
    assert play(steps, "heat").demand.tolist() == [1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert play(steps, "heat", decay=1.0).demand.tolist() == play(steps, "lfu").demand.tolist()
    assert play(steps, "lfu").demand.tolist()[7] == 0  # 1 stays: three selections


@pytest.mark.parametrize("seed", range(6))
def test_belady_is_the_least_of_all_schedules(seed):
    rng = np.random.default_rng(seed)
    steps = ["".join(map(str, rng.choice(6, rng.integers(1, 4), replace=False) + 1)) for _ in range(7)]

    @cache
    def least(t: int, resident: frozenset[int]) -> int:
        if t == len(steps):
            return 0
        now = {0, 9, *map(int, steps[t])}
        keep = [b for b in resident if b not in now]
        room = 5 - len(now)
        kept = [tuple(keep)] if len(keep) <= room else combinations(keep, room)
        return len(now - resident) + min(least(t + 1, frozenset([*now, *k])) for k in kept)

    best = play(steps, "belady").demand.sum()
    assert best == least(0, frozenset({0, 9}))
    assert all(best <= play(steps, policy).demand.sum() for policy in POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_step_selects_the_sink_and_the_tail_stay(policy):
    found = play(["123", "456", "123", "0", "123"], policy)
    assert found.demand.tolist() == [3, 3, 3, 0, 0]
    assert not found.missed[:, [0, -1]].any()


def test_forced_misses_are_counted_apart():
    # The sink itself is absent at first, block 8 is recent.
    start = np.zeros(10, dtype=np.int64)
    start[9] = 1
    ids = np.array([[0, 3, 8, 9], [0, 3, 8, 9]])
    found = simulate(
        ids,
        np.array([9501, 9502]),
        block_size=1000,
        sink_blocks=1,
        recent_blocks=2,
        capacity=5,
        start_used=start,
    )
    assert found.demand.tolist() == [3, 0] and found.forced.tolist() == [2, 0]


def test_residents_leave_in_the_order_of_their_last_use():
    assert play(["4", "1"], "lru", used="09312").demand.tolist() == [1, 0]  # 3 is the oldest
    assert play(["4", "3"], "lru", used="09312").demand.tolist() == [1, 1]


def test_a_row_that_sits_out_keeps_everything():
    ids = np.array([[0, 1, 2, 9], [-1, -1, -1, -1], [0, 1, 2, 9]])
    start = np.zeros(10, dtype=np.int64)
    start[[0, 9]] = 1
    found = simulate(
        ids, np.array([9501, 0, 9502]), block_size=1000, sink_blocks=1, recent_blocks=1, capacity=5,
        start_used=start, phases=[Phase(wanted=np.array([[5], [6], [5]]), window="layer")],
    )  # fmt: skip
    assert found.demand.tolist() == [2, 0, 0]
    assert found.early["layer"].tolist() == [1, 0, 0]


def test_a_pool_that_is_too_small_and_an_unknown_policy_are_refused():
    with pytest.raises(ValueError, match="5 slots cannot hold the 6 blocks of step 1"):
        play(["1", "1234"], "lru")
    with pytest.raises(ValueError, match="unknown policy 'mru'"):
        play(["1"], "mru")
