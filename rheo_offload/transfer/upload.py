"""Small host values to the device without making the host wait.

A copy from pinned memory is only queued, so its source must stay as it is until the copy has run. The uploader keeps a
ring of pinned staging buffers: the oldest is used again once its event says that its copy is done; while it is not,
the ring grows by one. On the CPU values are copied at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rheo_offload.device import Event, current_stream, empty_pinned, event, is_cuda


class Uploader:
    """Copies host values to one device, in the order of the current stream."""

    def __init__(
        self,
        device: torch.device | str,
        slots: int = 8,
        bytes: int = 4096,
        *,
        make_event: Callable[[], Event] | None = None,
    ) -> None:
        """Pin `slots` buffers of `bytes` bytes each (none on the CPU).

        Args:
            device: where the values go.
            slots: copies under way at once before the ring grows.
            bytes: size of a buffer; one that is too small for its payload is replaced by a larger one.
            make_event: makes the event of a buffer; given by tests only. Staging is then used on the CPU too.

        Raises:
            ValueError: `slots` or `bytes` is not positive.
        """
        if slots < 1 or bytes < 1:
            raise ValueError(f"an uploader needs at least one slot of one byte, not {slots} of {bytes}")
        self.device, self._bytes = torch.device(device), bytes
        self._staged = is_cuda(self.device) or make_event is not None
        self._make_event = make_event or partial(event, self.device)
        self._ring: deque[tuple[Tensor, Event | None]] = deque()
        if self._staged:
            self._ring.extend((self._buffer(bytes), None) for _ in range(slots))

    @property
    def slots(self) -> int:
        """Buffers in the ring."""
        return len(self._ring)

    def upload(
        self, values: Sequence[float] | Tensor, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Queue the copy of `values` on the current stream and return the device tensor. The host does not wait.

        `values` may be changed as soon as this returns. Not for use while a graph is captured.

        Args:
            values: numbers, or a CPU tensor of any shape.
            dtype: of the device tensor; values are converted on the host.
            out: contiguous device tensor of that dtype with as many elements; allocated when None.

        Raises:
            ValueError: `values` is not on the host, or `out` does not fit.
        """
        host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
        if host.device.type != "cpu":
            raise ValueError(f"values must be on the host, not on {host.device}")
        if out is None:
            out = torch.empty(host.shape, dtype=dtype, device=self.device)
        if out.dtype != dtype or out.numel() != host.numel() or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous {dtype} with {host.numel()} elements, not {out.dtype} {list(out.shape)}"
                + ("" if out.is_contiguous() else ", strided")
            )
        if not self._staged:
            out.copy_(host.view(out.shape))
        elif host.numel() > 0:
            self._copy_staged(host, dtype, out)
        return out

    def _copy_staged(self, host: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        buffer, done = self._take(out.numel() * dtype.itemsize)
        staged = buffer[: out.numel() * dtype.itemsize].view(dtype).view(out.shape)
        staged.copy_(host.reshape(out.shape))
        self._send(staged, out)
        done = done or self._make_event()
        done.record(current_stream(self.device))  # type: ignore[arg-type]
        self._ring.append((buffer, done))

    def _send(self, staged: Tensor, out: Tensor) -> None:
        """Queue the copy out of the pinned buffer."""
        out.copy_(staged, non_blocking=True)

    def _take(self, payload: int) -> tuple[Tensor, Event | None]:
        """Take a buffer of at least `payload` bytes that no copy reads any more out of the ring."""
        oldest, done = self._ring[0]
        if done is not None and not done.query():
            return self._buffer(max(self._bytes, payload)), None
        self._ring.popleft()
        return (oldest if oldest.numel() >= payload else self._buffer(payload)), done

    def _buffer(self, payload: int) -> Tensor:
        return empty_pinned(payload, dtype=torch.uint8, device=self.device)
