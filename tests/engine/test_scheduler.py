"""The scheduler: stories with numbers, and random schedules against a plain model."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rheo_offload.engine.request import Request, State
from rheo_offload.engine.scheduler import Scheduler, bucket_for
from rheo_offload.errors import RequestError
from rheo_offload.execution.graph import buckets_for
from rheo_offload.execution.sampler import SamplingParams

BLOCK = 4


class Store:
    """Host pages as the engine handles them: allocated at admission, released at the end."""

    def __init__(self, pages):
        self.total, self.held = pages, {}

    def free(self):
        return self.total - sum(self.held.values())


def request(name, prompt=5, new=3):
    return Request(
        id=str(name),
        prompt_ids=torch.zeros(prompt, dtype=torch.int64),
        params=SamplingParams(max_new_tokens=new),
    )


def scheduler(rows=4, pages=100, context=64, **kwargs):
    store = Store(pages)
    return Scheduler(rows, buckets_for(rows), BLOCK, context, store.free, **kwargs), store


def admit(sched, store):
    admitted = sched.admit()
    for r in admitted:
        store.held[r.id] = math.ceil((r.prompt_tokens + r.params.max_new_tokens) / BLOCK)
    return [r.id for r in admitted]


def run_all(sched):
    while chunk := sched.next_chunk(100):
        sched.prefilled(chunk[0], chunk[2])


def started(sched, store, count):
    requests = [request(i) for i in range(count)]
    for r in requests:
        sched.submit(r)
    admit(sched, store)
    run_all(sched)
    return requests


# ---- stories ---------------------------------------------------------------------------------------------------------


def test_first_in_first_out_over_the_lowest_rows():
    """Four rows, six requests: rows 0-3 go to the first four. 1 and 2 end: 4 gets row 1, then 5 gets row 2."""
    sched, store = scheduler()
    requests = started(sched, store, 6)
    assert [r.row for r in requests] == [0, 1, 2, 3, None, None]
    for r in requests[1:3]:
        sched.finish(r, "stop")
        del store.held[r.id]
        assert (r.state, r.finish_reason, r.row) == (State.FINISHED, "stop", None)
    assert admit(sched, store) == ["4", "5"]
    assert [r.row for r in requests[4:]] == [1, 2]


@pytest.mark.parametrize("allow_overtaking", [False, True])
def test_nobody_overtakes_one_that_waits_for_pages(allow_overtaking):
    """10 pages. A takes 6, B needs 8, C needs 2: C waits behind B unless overtaking is allowed; B keeps its place."""
    sched, store = scheduler(pages=10, allow_overtaking=allow_overtaking)
    a, b, c, d = request("a", 20, 4), request("b", 28, 4), request("c", 5, 3), request("d", 5, 3)
    for r in (a, b, c, d):
        sched.submit(r)
    assert admit(sched, store) == (["a", "c", "d"] if allow_overtaking else ["a"])
    assert [r.id for r in sched.waiting] == (["b"] if allow_overtaking else ["b", "c", "d"])
    sched.finish(a, "length")
    del store.held["a"]
    assert admit(sched, store) == ([] if allow_overtaking else ["b", "c"])


def test_one_that_was_overtaken_stays_at_the_head():
    """Two rows, 10 pages. A takes 6 and C 2; B needs 8 and D 2: B still comes before D, which has no row."""
    sched, store = scheduler(rows=2, pages=10, allow_overtaking=True)
    for r in (request("a", 20, 4), request("b", 28, 4), request("c", 5, 3), request("d", 5, 3)):
        sched.submit(r)
    assert admit(sched, store) == ["a", "c"]
    assert [r.id for r in sched.waiting] == ["b", "d"]


def test_a_prompt_goes_in_pieces_and_its_last_token_to_the_decode_path():
    """Oldest first, one piece at a time; a prompt of one token runs at once."""
    sched, store = scheduler()
    a, b, c = request("a", 8), request("b", 1), request("c", 3)
    for r in (a, b, c):
        sched.submit(r)
    admit(sched, store)
    assert [r.state for r in (a, b, c)] == [State.PREFILLING, State.RUNNING, State.PREFILLING]
    assert sched.running_rows == [1] and sched.bucket() == 2
    pieces = []
    while chunk := sched.next_chunk(3):
        assert sched.next_chunk(3) == chunk  # asking changes nothing
        pieces.append((chunk[0].id, *chunk[1:]))
        sched.prefilled(chunk[0], chunk[2])
    assert pieces == [("a", 0, 3), ("a", 3, 6), ("a", 6, 7), ("c", 0, 2)]
    assert sched.running_rows == [0, 1, 2]
    with pytest.raises(RequestError, match="running with 7 of 7"):
        sched.prefilled(a, 8)
    with pytest.raises(ValueError, match="not 0"):
        sched.next_chunk(0)


def test_compaction_moves_only_for_a_smaller_bucket():
    """Rows 0-5. 0 and 1 end: 4 rows up to row 5 fit bucket 4, so 4 and 5 move down in order."""
    sched, store = scheduler(rows=8)
    requests = started(sched, store, 6)
    assert sched.bucket() == 8
    assert sched.compaction() == []
    for r in requests[:2]:
        sched.finish(r, "stop")
    assert sched.compaction() == [(4, 0), (5, 1)]
    assert [r.row for r in requests] == [None, None, 2, 3, 0, 1]
    assert sched.bucket() == 4
    sched.finish(requests[4], "stop")
    assert sched.compaction() == []
    sched.finish(requests[5], "stop")
    assert sched.compaction() == [(2, 0), (3, 1)]
    assert sched.bucket() == 2


def test_compaction_goes_around_rows_that_are_prefilled():
    sched, store = scheduler(rows=4)
    a, b, c, d = (request(i) for i in "abcd")
    for r in (a, b, c, d):
        sched.submit(r)
    admit(sched, store)
    for r in (b, d):
        sched.prefilled(r, 4)
    sched.finish(c, "cancelled")
    sched.finish(b, "stop")
    assert sched.compaction() == [(3, 1)]  # a is in row 0
    assert sched.bucket() == 2


def test_cancel_and_fail():
    sched, store = scheduler(rows=1)
    a, b, c = request("a"), request("b"), request("c")
    for r in (a, b, c):
        sched.submit(r)
    admit(sched, store)
    assert sched.cancel("b") is b and (b.state, b.finish_reason) == (State.FINISHED, "cancelled")
    assert sched.cancel("b") is None
    error = RuntimeError("x")
    sched.fail(a, error)
    assert (a.state, a.finish_reason, a.error, a.row) == (State.FAILED, "error", error, None)
    store.held.clear()
    assert admit(sched, store) == ["c"] and c.row == 0
    sched.fail(c, error)
    assert sched.is_idle and sched.bucket() == 0
    with pytest.raises(RequestError, match="'a' is failed"):
        sched.finish(a, "stop")


@pytest.mark.parametrize(
    ("prompt", "new", "said"),
    [
        (0, 1, "empty prompt"),
        (65, 1, "65 prompt tokens, but a row holds 64"),
        (64, 1, "64 prompt tokens"),
        (60, 5, r"60 prompt \+ 5 new = 65 tokens.*lower max_new_tokens to 4"),
        (30, 20, "13 host pages of 4 tokens, but the store has 12 in total"),
    ],
)
def test_what_can_never_run_is_refused_at_once(prompt, new, said):
    sched, _ = scheduler(pages=12)
    with pytest.raises(RequestError, match=said):
        sched.submit(request("x", prompt, new))
    assert sched.is_idle


def test_the_total_of_pages_counts_those_in_use():
    sched, store = scheduler(pages=12)
    sched.submit(request("a", 20, 8))
    admit(sched, store)
    sched.submit(request("b", 40, 8))  # 12 pages: all there are, though 5 are free now
    assert admit(sched, store) == []


def test_an_id_is_used_once_at_a_time():
    sched, store = scheduler()
    a = request("a")
    sched.submit(a)
    for again in (a, request("a")):
        with pytest.raises(RequestError, match="submitted before"):
            sched.submit(again)
    admit(sched, store)
    with pytest.raises(RequestError, match="submitted before"):
        sched.submit(request("a"))
    sched.cancel("a")
    sched.submit(request("a"))


def test_the_largest_bucket_is_the_largest_batch():
    assert [bucket_for(n, (1, 2, 4, 6)) for n in (1, 2, 3, 5, 6)] == [1, 2, 4, 6, 6]
    with pytest.raises(RequestError, match="batch of 7 rows.*at most 6 rows fit"):
        bucket_for(7, (1, 2, 4, 6))
    with pytest.raises(RequestError, match="at most 4 rows fit"):
        Scheduler(8, (1, 2, 4), BLOCK, 64, lambda: 10)
    for buckets in ((), (0, 1), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="ascending"):
            Scheduler(1, buckets, BLOCK, 64, lambda: 10)
    with pytest.raises(ValueError, match="positive"):
        Scheduler(1, (1,), BLOCK, 0, lambda: 10)


# ---- random schedules ------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Random calls; the model is the arrival order, what each request is owed, and a store of pages."""

    @initialize(rows=st.integers(1, 7), pages=st.integers(6, 20), allow=st.booleans())
    def start(self, rows, pages, allow):
        self.sched, self.store = scheduler(rows, pages, context=24, allow_overtaking=allow)
        self.allow, self.count = allow, 0
        self.queue, self.live, self.done = [], [], []

    @rule(sizes=st.lists(st.tuples(st.integers(0, 26), st.integers(1, 8)), min_size=1, max_size=3))
    def submit(self, sizes):
        for prompt, new in sizes:
            self.submit_one(prompt, new)

    def submit_one(self, prompt, new):
        r = request(self.count, prompt, new)
        self.count += 1
        fits = prompt > 0 and prompt + new <= 24 and self.pages(r) <= self.store.total
        try:
            self.sched.submit(r)
        except RequestError:
            assert not fits
            return
        assert fits
        self.queue.append(r)

    @rule()
    def admit(self):
        before, free, expected = list(self.queue), self.store.free(), []
        rows = self.sched.max_rows - len(self.live)
        for r in before:
            if len(expected) == rows or (self.pages(r) > free and not self.allow):
                break
            if self.pages(r) <= free:
                expected.append(r)
                free -= self.pages(r)
        taken = [row for row in range(self.sched.max_rows) if row not in {r.row for r in self.live}]
        assert admit(self.sched, self.store) == [r.id for r in expected]
        assert [r.row for r in expected] == taken[: len(expected)]
        self.queue = [r for r in before if r not in expected]
        self.live += expected

    @rule(tokens=st.integers(1, 6), fails=st.integers(0, 9))
    def chunk(self, tokens, fails):
        waiting = [r for r in self.live if r.computed_tokens < r.prompt_tokens - 1]
        chunk = self.sched.next_chunk(tokens)
        assert (chunk is None) == (not waiting)
        if chunk is None:
            return
        r, start, end = chunk
        assert r is waiting[0] and start == r.computed_tokens and 0 < end - start <= tokens
        assert end == min(start + tokens, r.prompt_tokens - 1)
        if fails == 0:
            self.sched.fail(r, RuntimeError())
            self.gone(r)
        else:
            self.sched.prefilled(r, end)

    @precondition(lambda self: any(r.state is State.RUNNING for r in self.live))
    @rule(data=st.data())
    def finish(self, data):
        r = data.draw(st.sampled_from([r for r in self.live if r.state is State.RUNNING]))
        self.sched.finish(r, "stop")
        self.gone(r)

    @rule(name=st.integers(0, 30))
    def cancel(self, name):
        r = self.sched.cancel(str(name))
        assert r in [x for x in (*self.queue, *self.live) if x.id == str(name)] or r is None
        if r is not None:
            assert r.finish_reason == "cancelled"
            self.gone(r)
        else:
            assert all(x.id != str(name) for x in (*self.queue, *self.live))

    @rule()
    def compact(self):
        before = {r.row: r for r in self.live}
        old = self.sched.bucket()
        moves = self.sched.compaction()
        for source, target in moves:  # as the engine does them, one by one
            assert target not in before and target < source
            before[target] = before.pop(source)
        assert all(r.row == row for row, r in before.items())
        assert [before[t].id for _, t in moves] == sorted((before[t].id for _, t in moves), key=self.age)
        assert [t for _, t in moves] == sorted(t for _, t in moves)
        assert (self.sched.bucket() < old) == bool(moves)
        assert self.sched.bucket() == self.smallest_bucket()

    def smallest_bucket(self):
        running = sum(r.state is State.RUNNING for r in self.live)
        fixed = {r.row for r in self.live if r.state is State.PREFILLING}
        if not running:
            return 0
        return next(b for b in self.sched.buckets if running <= b - sum(row < b for row in fixed))

    def age(self, name):
        return [r.id for r in self.live].index(name)

    def pages(self, r):
        return math.ceil((r.prompt_tokens + r.params.max_new_tokens) / BLOCK)

    def gone(self, r):
        assert r.is_done and r.row is None
        self.store.held.pop(r.id, None)
        self.queue = [x for x in self.queue if x is not r]
        self.live = [x for x in self.live if x is not r]
        self.done.append(r)

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "sched"):
            return
        self.sched.check_integrity()
        assert list(self.sched.waiting) == self.queue
        assert self.sched.active == self.live
        assert self.sched.pages_reserved == sum(self.store.held.values()) == sum(map(self.pages, self.live))
        running = [r.row for r in self.live if r.computed_tokens == r.prompt_tokens - 1]
        assert self.sched.running_rows == sorted(running)
        assert self.sched.bucket() >= len(running)


TestRandomSchedules = Machine.TestCase
TestRandomSchedules.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
