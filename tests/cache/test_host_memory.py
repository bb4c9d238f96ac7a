"""The host range: one address, grown and pinned in steps, given back whatever happens."""

import ctypes
import gc
import mmap
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from rheo_offload.cache import host_memory
from rheo_offload.cache.host_memory import HostRange
from rheo_offload.errors import CacheError, HostMemoryError

PAGE = mmap.PAGESIZE
MIB = 1 << 20


class FakeCudart:
    """Counts registrations like the CUDA runtime, and refuses once `limit_bytes` are registered."""

    def __init__(self, limit_bytes: int = 1 << 62):
        self.limit_bytes = limit_bytes
        self.live: dict[int, int] = {}
        self.history: list[tuple[int, int]] = []

    def cudaHostRegister(self, address, nbytes, flags):
        assert address % PAGE == 0 and flags == 3
        if sum(self.live.values()) + nbytes > self.limit_bytes:
            return 2
        # memory must be touched before it is pinned, or pinning does the slow part on one thread
        assert bytes_resident(address, nbytes)
        self.live[address] = nbytes
        self.history.append((address, nbytes))
        return 0

    def cudaHostUnregister(self, address):
        del self.live[address]
        return 0


def bytes_resident(address: int, nbytes: int) -> bool:
    """Ask the kernel whether every page of the span is present."""
    present = np.zeros(-(-nbytes // PAGE), dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    code = libc.mincore(
        ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_void_p(present.ctypes.data)
    )
    assert code == 0, ctypes.get_errno()
    return bool((present & 1).all())


@pytest.fixture
def cudart(monkeypatch):
    fake = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)
    monkeypatch.setattr(host_memory, "_forget_cuda_error", lambda: None)
    return fake


def test_reserving_costs_no_memory_and_the_address_never_moves():
    before = psutil.Process().memory_info().rss
    with HostRange(1 << 38, pin=False) as host:
        address = host.tensor.data_ptr()
        assert host.tensor.dtype == torch.uint8 and host.tensor.shape == (1 << 38,)
        assert host.usable_bytes == 0
        host.ensure(3 * MIB + 1)
        assert 3 * MIB < host.usable_bytes <= 3 * MIB + PAGE
        host.tensor[: 3 * MIB] = 7
        host.ensure(9 * MIB)
        assert host.tensor.data_ptr() == address
        assert host.tensor[: 3 * MIB].eq(7).all(), "growing must not change what is there"
        assert host.tensor[3 * MIB : 9 * MIB].eq(0).all()
        assert psutil.Process().memory_info().rss - before < 64 * MIB


def test_ensure_touches_everything_it_reports():
    with HostRange(8 * MIB, pin=False, huge_pages=False, touch_threads=3) as host:
        host.ensure(4 * MIB)
        base = host.tensor.data_ptr()
        assert bytes_resident(base, host.usable_bytes)
        assert not bytes_resident(base + host.usable_bytes, PAGE)
        host.ensure(2 * MIB)
        assert host.usable_bytes == 4 * MIB, "a smaller wish shrinks nothing"


def test_registrations_tile_the_range_at_step_boundaries(cudart, monkeypatch):
    step = 3 * PAGE
    monkeypatch.setattr(host_memory, "GIB", 7 * PAGE)  # chunks of two steps
    monkeypatch.setattr(host_memory, "TOUCH_SPAN_BYTES", PAGE)
    host = HostRange(20 * PAGE, pin=True, step_bytes=step, touch_threads=2)
    base = host.tensor.data_ptr()
    host.ensure(1)
    assert cudart.history == [(base, step)]
    host.ensure(10 * PAGE)
    host.ensure(20 * PAGE)
    ends = [(start - base, start - base + size) for start, size in cudart.history]
    assert ends[0][0] == 0 and ends[-1][1] == 20 * PAGE
    assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False)), "no gap and no overlap"
    assert all(stop % step == 0 for _, stop in ends[:-1])
    assert all(stop - start <= 2 * step for start, stop in ends)
    host.close()
    assert cudart.live == {}


def test_refused_pinning_keeps_what_was_pinned_and_says_what_to_do(cudart, monkeypatch):
    monkeypatch.setattr(host_memory, "GIB", 2 * PAGE)
    cudart.limit_bytes = 4 * PAGE
    host = HostRange(64 * PAGE, pin=True)
    with pytest.raises(HostMemoryError, match=r"error 2.*cache\.host_memory.*ulimit -l"):
        host.ensure(64 * PAGE)
    assert host.usable_bytes == 4 * PAGE == sum(cudart.live.values())
    host.close()
    assert cudart.live == {}


def test_more_than_the_range_or_the_free_memory_is_refused(monkeypatch):
    with HostRange(4 * PAGE, pin=False) as host:
        with pytest.raises(HostMemoryError, match="raise cache.host_memory"):
            host.ensure(4 * PAGE + 1)
        monkeypatch.setattr(host_memory, "host_free_bytes", lambda: PAGE)
        with pytest.raises(HostMemoryError, match="lower cache.host_memory"):
            host.ensure(2 * PAGE)
        assert host.usable_bytes == 0
        host.ensure(PAGE)
        assert host.usable_bytes == PAGE


def test_an_impossible_reservation_names_the_knob():
    with pytest.raises(HostMemoryError, match=r"cache\.host_memory"):
        HostRange(1 << 60, pin=False)
    with pytest.raises(HostMemoryError, match=r"cache\.host_memory"):
        HostRange(1 << 64, pin=False)


@pytest.mark.parametrize(("max_bytes", "step"), [(0, PAGE), (PAGE, 0), (PAGE, PAGE + 1)])
def test_bad_sizes(max_bytes, step):
    with pytest.raises(ValueError, match="step_bytes"):
        HostRange(max_bytes, pin=False, step_bytes=step)


def test_close_gives_memory_back_at_once_even_under_views(cudart):
    host = HostRange(64 * MIB, pin=True)
    host.ensure(64 * MIB)
    view = host.tensor[MIB : 2 * MIB].view(torch.int32)
    view.fill_(5)
    before = psutil.Process().memory_info().rss
    host.close()
    host.close()
    assert cudart.live == {}
    assert before - psutil.Process().memory_info().rss > 48 * MIB
    assert view.eq(0).all(), "a view of a closed range is safe to read and holds nothing"
    assert host.usable_bytes == 0
    for use in (lambda: host.tensor, lambda: host.ensure(1)):
        with pytest.raises(CacheError, match="closed"):
            use()


def test_the_mapping_goes_with_the_last_view():
    host = HostRange(1 << 36, pin=False)
    view = host.tensor[:4]
    size = psutil.Process().memory_info().vms
    host.close()
    assert psutil.Process().memory_info().vms > size - (1 << 35)
    del host, view
    gc.collect()
    assert psutil.Process().memory_info().vms < size - (1 << 35)


def test_close_waits_for_every_gpu_in_use(cudart, monkeypatch):
    """Work in flight may still write to the range, on a GPU that is not the current one."""
    waited = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: device)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    host = HostRange(4 * PAGE, pin=True)
    host.ensure(PAGE)
    host.close()
    assert waited == [1, 2] and cudart.live == {}


def test_a_forgotten_range_is_unregistered(cudart):
    host = HostRange(4 * PAGE, pin=True)
    host.ensure(PAGE)
    assert cudart.live
    del host
    gc.collect()
    assert cudart.live == {}


def test_close_at_exit_unregisters_before_the_interpreter_goes():
    code = """
import torch
torch.cuda.synchronize = lambda *a: None
class Cudart:
    def cudaHostRegister(self, *args):
        return 0

    def cudaHostUnregister(self, address):
        print("unregistered", flush=True)
        return 0

torch.cuda.cudart = Cudart
from rheo_offload.cache.host_memory import HostRange
host = HostRange(1 << 20, pin=True)
host.ensure(1)
keep = host.tensor
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "unregistered"), done.stderr


def test_a_failing_unregister_is_reported(cudart, caplog):
    host = HostRange(PAGE, pin=True)
    host.ensure(PAGE)
    cudart.cudaHostUnregister = lambda address: 713
    host.close()
    assert "713" in caplog.text


@pytest.mark.gpu
def test_pinned_memory_is_read_and_written_by_the_device():
    with HostRange(1 << 30, pin=True, step_bytes=2 * MIB) as host:
        host.ensure(256 * MIB)
        part = host.tensor[: 256 * MIB].view(torch.int32)
        assert part.is_pinned()
        part.copy_(torch.arange(part.numel(), dtype=torch.int32))
        on_device = part.cuda(non_blocking=True)
        part.copy_(on_device + 1, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(part, torch.arange(1, part.numel() + 1, dtype=torch.int32))


@pytest.mark.parametrize("why", ["capturing", "refused"])
def test_a_range_that_cannot_be_unpinned_yet_keeps_its_addresses_until_it_can(monkeypatch, why):
    """The collector comes during a capture, or CUDA refuses: else a later range there could not be pinned."""

    class Cudart:
        calls, code = [], 900

        def cudaHostUnregister(self, address):  # noqa: N802
            self.calls.append(address)
            return self.code

    cudart, mapping = Cudart(), mmap.mmap(-1, PAGE)
    monkeypatch.setattr(host_memory, "_stuck", [])
    monkeypatch.setattr(host_memory, "_is_capturing", lambda: why == "capturing")
    host_memory._free(mapping, [4096], cudart)
    assert host_memory._stuck == [(mapping, [4096], cudart)]
    assert cudart.calls == ([] if why == "capturing" else [4096])
    monkeypatch.setattr(host_memory, "_is_capturing", lambda: False)
    Cudart.code = 0
    with HostRange(PAGE, pin=False):
        assert host_memory._stuck == [] and cudart.calls[-1] == 4096
