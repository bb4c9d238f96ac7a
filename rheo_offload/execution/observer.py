"""What may look on while an executor decodes: told of every step, and of every layer's selection inside it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rheo_offload.cache.device_pool import FullLayer
    from rheo_offload.execution.workspace import DecodeWorkspace


class StepObserver(Protocol):
    """Set as `Executor.observer`. `begin` and `note` are part of a captured step: device work, always the same."""

    def before_step(self, rows: Sequence[int] | None) -> None:
        """The host is about to queue a step for `rows` (None: all); their pages are there."""

    def begin(self, rows: int) -> None:
        """A step over the first `rows` rows begins; lengths on the device count its token."""

    def note(self, layer: "FullLayer", workspace: "DecodeWorkspace") -> None:
        """A layer has decided: what it selected, and what of that was resident, stands in its workspace."""
