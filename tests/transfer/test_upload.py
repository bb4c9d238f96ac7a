"""The uploader: values arrive as given, and a staging buffer is not touched before its copy has run."""

import pytest
import torch

from rheo_offload.transfer.upload import Uploader


class LateEvent:
    """An event that is done when the test says so."""

    def __init__(self, made):
        self.done, self.recorded = False, 0
        made.append(self)

    def record(self, stream=None):
        self.done, self.recorded = False, self.recorded + 1

    def query(self):
        return self.done


class LateUploader(Uploader):
    """Runs a copy only when its event is completed, as a busy device would."""

    def __init__(self, slots=2, bytes=64):
        self.events, self.pending = [], []
        super().__init__("cpu", slots, bytes, make_event=lambda: LateEvent(self.events))

    def _send(self, staged, out):
        self.pending.append((staged, out))

    def complete(self, count):
        """Run the oldest `count` copies; events are recorded in the same order."""
        for _ in range(count):
            staged, out = self.pending.pop(0)
            out.copy_(staged)
            self.oldest_outstanding().done = True

    def oldest_outstanding(self):
        return next(done for _, done in self._ring if done is not None and not done.done)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.bool])
def test_values_arrive_converted(dtype):
    got = Uploader("cpu").upload([3, 0, 1], dtype)
    assert torch.equal(got, torch.tensor([3, 0, 1], dtype=dtype))
    out = torch.zeros(2, 2, dtype=dtype)
    values = torch.arange(4.0)
    assert Uploader("cpu").upload(values, dtype, out) is out
    values.fill_(9)
    assert torch.equal(out, torch.arange(4.0).view(2, 2).to(dtype))


def test_a_buffer_waits_for_its_copy():
    """More uploads than buffers while nothing has been copied: every value still arrives."""
    uploader = LateUploader(slots=2)
    outs = [uploader.upload([i, i + 1], torch.int64) for i in range(5)]
    uploader.complete(5)
    assert [o.tolist() for o in outs] == [[i, i + 1] for i in range(5)]
    assert uploader.slots == 5


def test_buffers_are_used_again_once_copied():
    uploader = LateUploader(slots=3)
    for i in range(20):
        out = uploader.upload([float(i)], torch.float32)
        uploader.complete(1)
        assert out.tolist() == [i]
    assert uploader.slots == 3
    assert [e.recorded for e in uploader.events] == [7, 7, 6]


def test_the_ring_grows_only_as_far_as_copies_are_late():
    uploader = LateUploader(slots=1)
    outs = []
    for i in range(40):
        outs.append(uploader.upload([i], torch.int32))
        if len(uploader.pending) > 3:
            uploader.complete(1)
    uploader.complete(3)
    assert [int(o) for o in outs] == list(range(40))
    assert uploader.slots <= 4


def test_larger_payloads_get_larger_buffers():
    uploader = LateUploader(slots=1, bytes=8)
    first, large = torch.arange(100), torch.arange(1000)
    outs = [uploader.upload(first, torch.int64), uploader.upload(large, torch.int16)]
    uploader.complete(2)
    assert torch.equal(outs[0], first)
    assert torch.equal(outs[1], large.short())
    assert uploader.upload([], torch.int64).shape == (0,)


def test_what_does_not_fit_is_refused():
    uploader = Uploader("cpu")
    with pytest.raises(ValueError, match="3 elements"):
        uploader.upload([1, 2, 3], torch.int64, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        uploader.upload([1], torch.int64, torch.zeros(1))
    with pytest.raises(ValueError, match="strided"):
        uploader.upload([1, 2], torch.int64, torch.zeros(4, dtype=torch.int64)[::2])
    with pytest.raises(ValueError, match="not on meta"):
        uploader.upload(torch.empty(1, device="meta"), torch.int64)
    with pytest.raises(ValueError, match="0 of 4096"):
        Uploader("cpu", slots=0)


@pytest.mark.gpu
def test_the_host_does_not_wait():
    uploader = Uploader("cuda", slots=8, bytes=512)
    out = torch.zeros(64, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        later = [uploader.upload([i] * 64, torch.int64) for i in range(6)]
        uploader.upload(list(range(64)), torch.int64, out)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [t.tolist() for t in later] == [[i] * 64 for i in range(6)]
    assert out.tolist() == list(range(64))
