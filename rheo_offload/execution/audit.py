"""What the selection left out, measured: on every n-th decode step one row's keys are all attended too.

mass = exp(lse_selected - lse_all) per query head; both are natural-log, without sinks. The output error is the relative
L2 distance of the layer's attention output, all heads of the row together, from that over every key. Attending to
everything reads a whole row from the host, so an audited step takes one row, and the next one the next row. With
`audit.logits` the row's token also runs through the model a second time (`model/audit_logits.py`).
"""

import torch

from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.device import Event, current_stream, empty_pinned, event
from rheo_offload.metrics.stats import LayerAudit


class Audit:
    """Accumulates captured mass and output error per layer, and the KL of the logits, on the device."""

    def __init__(self, every: int, device: torch.device) -> None:
        self.every, self.device = every, device
        self.steps = 0
        """Decode steps measured so far, the one in progress included."""
        self._totals: dict[
            int, torch.Tensor
        ] = {}  # layer -> how many, sum of masses, smallest, sum of errors, largest
        self._logits: torch.Tensor | None = None  # how many, sum of KL, largest
        self._latest: dict[int, torch.Tensor] = {}  # layer -> mass of the last audited row
        self._fetched: tuple[list[int], torch.Tensor, Event] | None = None

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
        out_selected: torch.Tensor,
        out_all: torch.Tensor,
    ) -> None:
        """Add one layer's step: lse [1, Hq] and output [1, Hq, D] over the selected keys and over all of them."""
        i = layer.spec.layer_idx
        if i not in self._totals:
            self._totals[i] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], device=self.device)
        mass = torch.exp(lse_selected - lse_all).clamp(max=1.0)
        present = torch.isfinite(lse_all).any().float()  # a row that sits the step out has no keys to miss
        mass = mass.nan_to_num(1.0)
        truth = out_all.float()
        error = (out_selected.float() - truth).norm() / truth.norm()
        error = error.nan_to_num(0.0)
        count, masses, low, errors, high = self._totals[i]
        self._totals[i] = torch.stack(
            [
                count + present,
                masses + mass.mean() * present,
                torch.minimum(low, mass.min()),
                errors + error * present,
                torch.maximum(high, error * present),
            ]
        )
        self._latest[i] = torch.where(present > 0, mass.mean(), 1.0)

    def record_logits(self, dense: torch.Tensor, sparse: torch.Tensor, present: torch.Tensor) -> None:
        """Add the KL(dense || sparse) of one row's next token.

        Args:
            dense: logits [V] of decoding with every layer attending to everything.
            sparse: logits [V] of the step.
            present: bool, whether the row took part.
        """
        if self._logits is None:
            self._logits = torch.zeros(3, dtype=torch.float64, device=self.device)
        p, q = (torch.log_softmax(logits.double(), -1) for logits in (dense, sparse))
        # a token that neither may choose (-inf) adds nothing; rounding can leave the sum a little below 0
        kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum().clamp(min=0)
        counted = present & kl.isfinite()  # logits that are not finite stop the run, not the figures
        kl = torch.where(counted, kl, 0.0)
        count, total, high = self._logits
        self._logits = torch.stack([count + counted, total + kl, torch.maximum(high, kl)])

    def logit_kl(self) -> tuple[int, float | None, float | None]:
        """Return how many rows' logits were measured, and mean and largest KL in nats. Waits for the device."""
        count, total, high = [0.0] * 3 if self._logits is None else self._logits.tolist()
        return (int(count), total / count, high) if count else (0, None, None)

    def per_layer(self) -> list[LayerAudit]:
        """Return the figures of every audited layer. Waits for the device."""
        found = {i: totals.tolist() for i, totals in sorted(self._totals.items())}
        return [
            LayerAudit(
                layer_idx=i,
                captured_mass_mean=masses / count,
                captured_mass_min=low,
                output_error_mean=errors / count,
                output_error_max=high,
            )
            for i, (count, masses, low, errors, high) in found.items()
            if count
        ]

    def fetch(self) -> None:
        """Queue the copy of what the last audited step measured; `fetched` has it when it is asked."""
        if self._latest:
            layers = list(self._latest)
            target = empty_pinned(len(layers), dtype=torch.float32, device=self.device)
            target.copy_(torch.stack([self._latest[i] for i in layers]), non_blocking=True)
            arrived = event(self.device)
            arrived.record(current_stream(self.device))  # type: ignore[arg-type]
            self._fetched = layers, target, arrived

    def fetched(self) -> dict[int, float]:
        """Return layer_idx -> captured mass as of the last `fetch`, once; waits until it has arrived."""
        if self._fetched is None:
            return {}
        layers, values, arrived = self._fetched
        self._fetched = None
        arrived.synchronize()
        return dict(zip(layers, values.tolist(), strict=True))
