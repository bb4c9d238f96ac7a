"""When the gather of missing blocks runs: on a stream of its own beside the attention over the resident ones.

`start` queues the copy behind everything already queued; `wait` makes the following work see it. On the CPU the
copy simply runs. Both can be captured in a CUDA graph (a fork and a join through events).
"""

from collections.abc import Callable

import torch

from rheo_offload.device import current_stream, is_cuda, on_stream, own_streams, wait


class GatherEngine:
    """Runs one copy at a time."""

    def __init__(self, device: torch.device, overlap: bool) -> None:
        self.device = device
        self.stream = own_streams(device)[1] if overlap and is_cuda(device) else None

    def start(self, copy: Callable[[], None]) -> None:
        """Queue the copy; it starts once the work queued so far is done."""
        if self.stream is None:
            copy()
            return
        wait(self.stream, current_stream(self.device))
        with on_stream(self.stream):
            copy()

    def wait(self) -> None:
        """Make the current stream wait for the copy (the host does not)."""
        if self.stream is not None:
            wait(current_stream(self.device), self.stream)
