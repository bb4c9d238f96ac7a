"""Host pages: allocation against a dict model, views, and errors that change nothing."""

import mmap

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rheo_offload.cache import host_store
from rheo_offload.cache.host_store import HostStore, host_budget
from rheo_offload.errors import CacheError, HostMemoryError

PAGE_BYTES = 96  # no divisor of the OS page: pages lie across its borders
MAX_PAGES = 12
GIB = 1 << 30


def make(page_bytes=PAGE_BYTES, max_pages=MAX_PAGES, growth_pages=2, **kwargs) -> HostStore:
    return HostStore(page_bytes, max_pages, pin=False, growth_pages=growth_pages, **kwargs)


class StoreAgainstDict(RuleBasedStateMachine):
    """A dict page -> (references, fill byte) says what every page must be and hold."""

    def __init__(self):
        super().__init__()
        self.store = make()
        self.bytes = self.store.layer_view(0, (PAGE_BYTES,), torch.uint8)
        self.model: dict[int, tuple[int, int]] = {}
        self.stamp = 0

    def pick(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule(n=st.integers(0, MAX_PAGES + 1))
    def allocate(self, n):
        free = [page for page in range(1, MAX_PAGES) if page not in self.model]
        if n > len(free):
            with pytest.raises(HostMemoryError, match="pages"):
                self.store.allocate(n)
            return
        assert self.store.allocate(n) == free[:n], "lowest free first"
        for page in free[:n]:
            self.stamp = (self.stamp + 1) % 256
            self.model[page] = (1, self.stamp)
            self.bytes[page] = self.stamp

    @precondition(lambda self: self.model)
    @rule(data=st.data(), times=st.integers(1, 3))
    def retain(self, data, times):
        page = self.pick(data)
        self.store.retain([page] * times)
        self.model[page] = (self.model[page][0] + times, self.model[page][1])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), times=st.integers(1, 3))
    def release(self, data, times):
        page, other = self.pick(data), self.pick(data)
        wanted = [other] + [page] * times
        short = any(wanted.count(p) > self.model[p][0] for p in wanted)
        if short:
            with pytest.raises(CacheError, match="released"):
                self.store.release(wanted)
            return
        self.store.release(wanted)
        for p in wanted:
            self.model[p] = (self.model[p][0] - 1, self.model[p][1])
        self.model = {p: state for p, state in self.model.items() if state[0] > 0}

    @rule(page=st.integers(-1, MAX_PAGES))
    def reject_unowned(self, page):
        if page not in self.model:
            for call in (self.store.retain, self.store.release):
                with pytest.raises(CacheError, match="not allocated"):
                    call([*self.model, page])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def copy(self, data):
        src, dst = self.pick(data), self.pick(data)
        self.store.copy_page(src, dst)
        self.model[dst] = (self.model[dst][0], self.model[src][1])

    @invariant()
    def agrees(self):
        self.store.check_integrity()
        assert self.store.pages_in_use == len(self.model)
        assert self.store.pages_free == MAX_PAGES - 1 - len(self.model)
        assert self.store.bytes_in_use == PAGE_BYTES * len(self.model)
        for page in range(MAX_PAGES):
            assert self.store.refcount(page) == self.model.get(page, (0, 0))[0]
        for page, (_, fill) in self.model.items():
            assert self.bytes[page].eq(fill).all()

    def teardown(self):
        self.store.close()


StoreAgainstDict.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStoreAgainstDict = StoreAgainstDict.TestCase


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_layer_views_are_the_pages_bytes(dtype):
    with make(page_bytes=256, max_pages=5) as store:
        raw = store.layer_view(0, (256,), torch.uint8)
        raw.copy_(torch.arange(5 * 256).remainder(251).view(5, 256))
        view = store.layer_view(64, (2, 3, 4), dtype)
        assert view.shape == (5, 2, 3, 4) and view[0].is_contiguous()
        assert view.data_ptr() == raw.data_ptr() + 64
        part = raw[:, 64 : 64 + 24 * dtype.itemsize].contiguous().view(dtype).view(5, 2, 3, 4)
        assert torch.equal(view.contiguous().view(torch.uint8), part.contiguous().view(torch.uint8))


def test_writing_one_layer_leaves_its_neighbours_alone():
    with make(page_bytes=64, max_pages=4) as store:
        first, second = (store.layer_view(offset, (8,), torch.float32) for offset in (0, 32))
        first.fill_(float("nan"))
        second.fill_(1.0)
        first[2] = 3.0
        assert second.eq(1.0).all() and first[2].eq(3.0).all() and first[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize(
    ("offset", "shape", "dtype", "message"),
    [
        (0, (25,), torch.float32, "do not fit"),
        (92, (2,), torch.float32, "do not fit"),
        (-4, (1,), torch.float32, "do not fit"),
        (2, (1,), torch.float32, "multiples of 4"),
    ],
)
def test_views_that_do_not_fit(offset, shape, dtype, message):
    with make() as store, pytest.raises(ValueError, match=message):
        store.layer_view(offset, shape, dtype)


def test_the_address_stays_while_the_store_grows():
    page_bytes = 2 * mmap.PAGESIZE
    with make(page_bytes=page_bytes, max_pages=100, growth_pages=3) as store:
        view = store.layer_view(0, (page_bytes,), torch.uint8)
        address = view.data_ptr()
        assert store.bytes_usable == 2 * page_bytes, "the scratch page, and as much again"
        grown = []
        for _ in range(99):
            before = store.bytes_usable
            (page,) = store.allocate(1)
            grown.append(store.bytes_usable > before)
            assert store.bytes_usable >= (page + 1) * page_bytes
        assert store.layer_view(0, (page_bytes,), torch.uint8).data_ptr() == address
        assert store.bytes_usable == 100 * page_bytes
        assert sum(grown) < 30, "growing is rare"


def test_no_registration_ends_inside_a_page(monkeypatch):
    ranges = []
    original = host_store.HostRange

    def spy(*args, **kwargs):
        ranges.append(kwargs["step_bytes"])
        return original(*args, **kwargs)

    monkeypatch.setattr(host_store, "HostRange", spy)
    make(page_bytes=PAGE_BYTES).close()
    make(page_bytes=8 << 20).close()
    assert all(
        step % size == 0 and step % mmap.PAGESIZE == 0
        for step, size in zip(ranges, (96, 8 << 20), strict=True)
    )


def test_the_error_says_how_much_context_fits():
    with make(page_bytes=1 << 20, tokens_per_page=64) as store:
        store.allocate(4)
        with pytest.raises(HostMemoryError) as error:
            store.allocate(100)
        for part in (
            "100 host pages (0.10 GiB)",
            "7 (0.01 GiB) free",
            "448 more tokens",
            "cache.host_memory",
        ):
            assert part in str(error.value)
        assert store.pages_in_use == 4
        store.check_integrity()


def test_no_memory_for_growth_changes_nothing(monkeypatch):
    with make(page_bytes=1 << 20, max_pages=32) as store:
        store.allocate(2)
        monkeypatch.setattr("rheo_offload.cache.host_memory.host_free_bytes", lambda: 0)
        with pytest.raises(HostMemoryError, match="free"):
            store.allocate(20)
        assert store.pages_in_use == 2
        store.check_integrity()


def test_a_store_that_cannot_start_gives_its_range_back(monkeypatch):
    closed = []
    monkeypatch.setattr(host_store.HostRange, "close", lambda self: closed.append(self))
    monkeypatch.setattr("rheo_offload.cache.host_memory.host_free_bytes", lambda: 0)
    with pytest.raises(HostMemoryError):
        make()
    assert len(closed) == 1


def test_integrity_check_sees_damage():
    for damage in (
        lambda s: s._references.__setitem__(0, 1),
        lambda s: s._references.__setitem__(2, 0),
        lambda s: s._references.__setitem__(9, 1),
        lambda s: s._references.__setitem__(1, -1),
        lambda s: s._freed.append(1),
        lambda s: s._freed.append(0),
        lambda s: setattr(s, "_first_unused", 10**6),
    ):
        with make() as store:
            store.allocate(3)
            store.check_integrity()
            damage(store)
            with pytest.raises(CacheError):
                store.check_integrity()


def test_closed_store_refuses():
    store = make(growth_pages=0)
    store.close()
    store.close()
    with pytest.raises(CacheError, match="closed"):
        store.allocate(MAX_PAGES - 1)


@pytest.mark.parametrize("kwargs", [{"page_bytes": 0}, {"max_pages": 0}, {"growth_pages": -1}])
def test_bad_sizes(kwargs):
    with pytest.raises(ValueError, match="page_bytes"):
        make(**kwargs)
    with make() as store, pytest.raises(ValueError):
        store.allocate(-1)


def test_host_budget(monkeypatch):
    monkeypatch.setattr(host_store, "host_free_bytes", lambda: 10 * GIB)
    assert host_budget("auto") == 8 * GIB
    assert host_budget(3 * GIB) == 3 * GIB
    with pytest.raises(HostMemoryError, match=r"11\.00 GiB and 10\.00 GiB.*"):
        host_budget(11 * GIB)
    for wrong in (0, -1, "3GiB", 1.5):
        with pytest.raises(ValueError, match="auto"):
            host_budget(wrong)


@pytest.mark.gpu
def test_the_device_reads_pages_on_both_sides_of_a_registration():
    page_bytes = 3 << 20
    with HostStore(page_bytes, 64, pin=True, growth_pages=1) as store:
        view = store.layer_view(0, (page_bytes // 4,), torch.int32)
        for _ in range(63):
            (page,) = store.allocate(1)
            view[page] = page
            on_device = torch.full((page_bytes // 4,), -1, dtype=torch.int32, device="cuda")
            on_device.copy_(view[page], non_blocking=True)
            torch.cuda.synchronize()
            assert on_device.eq(page).all()
        assert np.array_equal(view[1:, 0].numpy(), np.arange(1, 64))
