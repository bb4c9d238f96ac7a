"""Captured attention mass and error of the output, measured: on every n-th decode step a row attends to all its keys.

mass = exp(lse_selected - lse_all) per query head; both are natural-log, without sinks. The error of the output is its
distance from the dense one, relative to that one's norm, over all heads of the row. Attending to everything reads a
whole row from the host, so an audited step takes one row, and the next one the next row.
"""

import torch

from rheo_offload.cache.device_pool import FullLayer


class Audit:
    """Accumulates captured mass (mean, minimum) and output error (mean) per layer, on the device."""

    def __init__(self, every: int, device: torch.device) -> None:
        self.every, self.device = every, device
        self.steps = 0
        """Decode steps measured so far, the one in progress included."""
        self._totals: dict[int, torch.Tensor] = {}  # layer -> sums of masses and errors, count, smallest

    def due(self, step: int) -> bool:
        """Whether decode step `step` (from 1) is measured. The first one is, so that short runs have a figure."""
        due = self.every > 0 and (step - 1) % self.every == 0
        self.steps += due
        return due

    def row(self, rows: int) -> slice:
        """Return which of the first `rows` rows this step measures."""
        row = (self.steps - 1) % rows
        return slice(row, row + 1)

    def record(
        self,
        layer: FullLayer,
        lse_selected: torch.Tensor,
        lse_all: torch.Tensor,
        out: torch.Tensor,
        out_all: torch.Tensor,
    ) -> None:
        """Add one layer's step: lse [1, Hq] over the selected keys and over all, its output and the dense one."""
        i = layer.spec.layer_idx
        if i not in self._totals:
            self._totals[i] = torch.tensor([0.0, 0.0, 0.0, 1.0], device=self.device)
        mass = torch.exp(lse_selected - lse_all).clamp(max=1.0)
        present = torch.isfinite(lse_all).any().float()  # a row that sits the step out has no keys to miss
        mass = mass.nan_to_num(1.0)
        exact = out_all.float()
        error = (out.float() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
        total, errors, count, low = self._totals[i]
        self._totals[i] = torch.stack(
            [
                total + mass.mean() * present,
                errors + error * present,
                count + present,
                torch.minimum(low, mass.min()),
            ]
        )

    def per_layer(self) -> dict[int, tuple[float, float, float]]:
        """Return layer_idx -> (mean mass, smallest mass, mean error of the output). Waits for the device."""
        found = {i: totals.tolist() for i, totals in self._totals.items()}
        return {i: (t / count, low, e / count) for i, (t, e, count, low) in found.items() if count}
