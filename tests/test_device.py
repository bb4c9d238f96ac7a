"""The device shim: CPU stand-ins, control group limits and free memory."""

import pytest
import torch

from rheo_offload import device as shim
from rheo_offload.errors import ConfigError
from rheo_offload.ops import kernels_for

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def group(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(str(text))


def v2(limit, usage, inactive_file=0, active_file=0):
    return {
        "memory__max": f"{limit}\n",
        "memory__current": f"{usage}\n",
        "memory__stat": f"anon 5\ninactive_file {inactive_file}\nactive_file {active_file}\n",
    }


def v1(limit, usage, inactive_file=0, active_file=0):
    return {
        "memory__limit_in_bytes": f"{limit}\n",
        "memory__usage_in_bytes": f"{usage}\n",
        "memory__stat": f"inactive_file 1\ntotal_inactive_file {inactive_file}\n"
        f"total_active_file {active_file}\n",
    }


@pytest.fixture
def free(tmp_path):
    def _free(listing: str) -> int | None:
        proc = tmp_path / "listing"
        proc.write_text(listing)
        return shim.cgroup_free_bytes(tmp_path / "cgroup", proc)

    return _free


def test_no_control_group_is_no_limit(free, tmp_path):
    assert free("0::/\n") is None
    assert free("") is None
    assert shim.cgroup_free_bytes(tmp_path, tmp_path / "missing") is None


def test_v2_counts_file_cache_as_free(free, tmp_path):
    group(tmp_path / "cgroup/pod/box", **v2(1000, 700, inactive_file=150, active_file=50))
    assert free("0::/pod/box\n") == 500


def test_v2_the_tightest_ancestor_wins(free, tmp_path):
    group(tmp_path / "cgroup", **v2(5000, 100))
    group(tmp_path / "cgroup/pod", **v2(1000, 900))
    group(tmp_path / "cgroup/pod/box", **v2("max", 700))
    assert free("0::/pod/box\n") == 100


def test_a_container_sees_its_own_group_as_the_mount(free, tmp_path):
    group(tmp_path / "cgroup", **v2(1000, 400))
    assert free("0::/../../elsewhere\n") == 600
    assert free("0::/\n") == 600


def test_v1_and_mixed_mounts(free, tmp_path):
    group(tmp_path / "cgroup/memory", **v1(1 << 63, 50))
    assert free("5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n") is None
    group(tmp_path / "cgroup/memory/box", **v1(1000, 700, inactive_file=20, active_file=30))
    assert free("5:cpu,cpuacct:/box\n4:memory:/box\n0::/\n") == 350
    assert free("5:cpu,cpuacct:/box\n") is None


def test_usage_above_the_limit_is_nothing_free(free, tmp_path):
    group(tmp_path / "cgroup", **v2(1000, 1200))
    assert free("0::/\n") == 0


def test_host_free_is_the_smaller_of_machine_and_group(monkeypatch):
    machine = shim.host_free_bytes()
    assert machine > 0
    monkeypatch.setattr(shim, "cgroup_free_bytes", lambda: 12345)
    assert shim.host_free_bytes() == 12345 == shim.device_free_bytes("cpu")
    monkeypatch.setattr(shim, "cgroup_free_bytes", lambda: 1 << 62)
    assert 0 < shim.host_free_bytes() < 1 << 62


def test_other_devices_are_refused():
    for call in (shim.stream, shim.event, shim.synchronize, shim.device_free_bytes):
        with pytest.raises(ValueError, match="cuda or cpu"):
            call("meta")


@pytest.mark.parametrize("device", DEVICES)
def test_events_measure_milliseconds(device):
    start, end = shim.event(device, timing=True), shim.event(device, timing=True)
    start.record()
    torch.ones(1 << 20, device=device).sum()
    end.record()
    shim.synchronize(device)
    assert 0 < start.elapsed_time(end) < 60_000


def test_an_unrecorded_cpu_event_has_no_time():
    start, end = shim.event("cpu", timing=True), shim.event("cpu", timing=True)
    end.record()
    with pytest.raises(ValueError, match="recorded"):
        start.elapsed_time(end)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_pinned(device):
    t = shim.empty_pinned(3, 4, dtype=torch.int16, device=device)
    assert t.shape == (3, 4) and t.dtype == torch.int16 and t.device.type == "cpu"
    assert t.is_pinned() == (device == "cuda")


@pytest.mark.gpu
def test_device_free_counts_what_the_allocator_holds():
    torch.cuda.empty_cache()
    before = shim.device_free_bytes("cuda")
    t = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    used = before - shim.device_free_bytes("cuda")
    del t
    assert 255 << 20 < used < 300 << 20
    assert shim.device_free_bytes("cuda") > before - (32 << 20), "freed but still reserved is free"


def test_triton_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ConfigError, match=r"execution\.kernels triton needs a GPU"):
        kernels_for(torch.device("cpu"), "triton")
