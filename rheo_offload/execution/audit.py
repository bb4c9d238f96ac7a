"""Captured attention mass, measured: on every n-th decode step all keys are attended too.

mass = exp(lse_selected - lse_all) per row and query head; both are natural-log, without sinks.
"""

import torch

from rheo_offload.cache.device_pool import FullLayer


class Audit:
    """Accumulates mean and minimum of the captured mass per layer, on the device."""

    def __init__(self, every: int, device: torch.device) -> None:
        self.every, self.device = every, device
        self._sum: dict[int, torch.Tensor] = {}
        self._min: dict[int, torch.Tensor] = {}
        self._count: dict[int, int] = {}

    def due(self, step: int) -> bool:
        """Whether decode step `step` (from 1) is measured. The first one is, so that short runs have a figure."""
        return self.every > 0 and (step - 1) % self.every == 0

    def record(self, layer: FullLayer, lse_selected: torch.Tensor, lse_all: torch.Tensor) -> None:
        """Add one layer's step: lse [B, Hq] over the selected keys and over all of them."""
        mass = (
            torch.exp(lse_selected - lse_all).clamp(max=1.0).nan_to_num(1.0)
        )  # an inactive row has no keys to miss
        i = layer.spec.layer_idx
        self._sum[i] = self._sum.get(i, torch.zeros((), device=self.device)) + mass.mean()
        self._min[i] = torch.minimum(self._min.get(i, torch.ones((), device=self.device)), mass.min())
        self._count[i] = self._count.get(i, 0) + 1

    def per_layer(self) -> dict[int, tuple[float, float]]:
        """Return layer_idx -> (mean, minimum) of the captured mass. Waits for the device."""
        return {i: (float(self._sum[i]) / n, float(self._min[i])) for i, n in self._count.items()}

    @property
    def steps(self) -> int:
        """Decode steps measured so far."""
        return max(self._count.values(), default=0)
