"""The gather's stream."""

import pytest
import torch

from rheo_offload.execution.graph import capture_stream
from rheo_offload.transfer.gather_engine import GatherEngine


@pytest.mark.gpu
def test_a_gather_is_never_on_the_stream_that_is_captured():
    """torch hands out 32 streams in turn: an engine made for each of many runs would meet every one of them."""
    device = torch.device("cuda", torch.cuda.current_device())
    engines = [GatherEngine(device, overlap=True) for _ in range(40)]
    streams = {engine.stream.cuda_stream for engine in engines}
    assert len(streams) == 1
    assert not streams & {capture_stream(device).cuda_stream, torch.cuda.current_stream().cuda_stream}


def test_without_overlap_the_copy_is_queued_in_line():
    ran = []
    engine = GatherEngine(torch.device("cpu"), overlap=True)
    assert engine.stream is None
    engine.start(lambda: ran.append("copy"))
    engine.wait()
    assert ran == ["copy"]
