"""Larger budgets for layers whose audited attention mass stays below a threshold (`audit.raise_below`).

The budget of a layer is a constant of a captured step, so a raise ends the captured steps (`Executor.version`) and they
are captured again. Raises follow a fixed schedule, audit by audit, so that a run can be repeated.
"""

import logging
import math
from collections.abc import Iterable, Mapping

from rheo_offload.cache.device_pool import FullLayer
from rheo_offload.selection.policy import widened
from rheo_offload.types import Policy

logger = logging.getLogger("rheo_offload")

FACTOR = 1.5


class RaisedBudgets:
    """Which layers of a batch attend to more blocks than configured."""

    def __init__(self, below: float) -> None:
        """Take the threshold of the captured mass; 0: never raise. The configured policy comes with every question."""
        self.below = below
        self._wanted: dict[int, int] = {}
        self._at_most: set[int] = set()  # layers that cannot be raised further, said once

    @property
    def layers(self) -> Iterable[int]:
        """Layers that were raised."""
        return self._wanted

    def blocks_of(self, layer: FullLayer, policy: Policy) -> int:
        """Return the budget of a layer: as raised, at most what its pool holds beside the tail."""
        configured = policy.block_budget
        wanted = self._wanted.get(layer.spec.layer_idx, configured)
        return configured if wanted == configured else max(configured, min(wanted, _room(layer)))

    def policy_of(self, layer: FullLayer, policy: Policy) -> Policy:
        """Return the policy of a layer that selects."""
        blocks = self.blocks_of(layer, policy)
        return policy if blocks == policy.block_budget else widened(policy, blocks)

    def learn(self, masses: Mapping[int, float], layers: Mapping[int, FullLayer], policy: Policy) -> None:
        """Raise the layers whose captured mass is below the threshold by half, up to what their pool holds."""
        for i, mass in masses.items():
            if mass >= self.below:
                continue
            now, room = self.blocks_of(layers[i], policy), _room(layers[i])
            if now < room:
                self._wanted[i] = min(room, math.ceil(now * FACTOR))
                what = f"budget {now} -> {self._wanted[i]} blocks"
            elif i not in self._at_most:
                self._at_most.add(i)
                what = f"its budget of {now} blocks fills the pool; raise cache.capacity_ratio"
            else:
                continue
            logger.warning(
                "layer %d captured %.3f of the attention mass, audit.raise_below is %.3f: %s",
                i,
                mass,
                self.below,
                what,
            )


def _room(layer: FullLayer) -> int:
    """The blocks a layer can attend to at once: all of them, or its slots but the tail's."""
    return layer.max_blocks if layer.capacity >= layer.max_blocks else layer.capacity - 1
