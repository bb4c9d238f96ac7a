"""Every error this package raises on purpose. The message names the cause and the remedy."""

from collections.abc import Sequence


class RheoError(Exception):
    """Base of all errors of this package; the command line prints it as one line."""


class ConfigError(RheoError, ValueError):
    """A configuration key is unknown, or its value of the wrong type or out of range."""


class UnsupportedModelError(RheoError):
    """The model cannot be offloaded.

    Args:
        reasons: every reason found, not only the first; the message lists all of them.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = list(reasons)
        super().__init__("this model cannot be offloaded: " + "; ".join(self.reasons))


class HeadsError(RheoError):
    """The learned heads of a selection method are missing, or do not fit the model.

    Args:
        reasons: every reason found, not only the first; the message lists all of them.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = list(reasons)
        super().__init__("the learned heads cannot be used: " + "; ".join(self.reasons))


class HostMemoryError(RheoError):
    """The host store does not fit. The message says what was needed, what was free, which key decides."""


class DeviceMemoryError(RheoError):
    """The device pool does not fit. The message says what was needed, what was free, which key decides."""


class CacheError(RheoError):
    """The cache was used in a way it cannot serve (length, batch, order of calls)."""


class NonFiniteError(RheoError):
    """NaN or infinity turned up where only finite numbers may be."""


class GraphError(RheoError):
    """A decode step cannot be replayed as asked: too many rows, or a model that changed after it was captured."""


class RequestError(RheoError):
    """A request cannot be served: it can never fit, or it was used out of order. Names the numbers and the remedy."""


class TraceError(RheoError):
    """A trace cannot be recorded, read or replayed; the message says what is wrong with it."""


class EngineError(RheoError):
    """The engine cannot do what was asked, or a step failed; the message names the requests."""


class CalibrationError(RheoError):
    """Heads cannot be fitted: too little text, a model without layers to fit, a place that cannot be written."""
