"""Rotary embeddings as plain data, so that a method can take keys and queries back to before the rotation.

transformers hands the cache what has been rotated already. The rotation is orthogonal and its angle depends on the
position alone, which a block knows, so it is undone exactly: rotated by minus the angle, divided by the scaling.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """One layer's rotation. A layer without one has no frequencies, and nothing changes there."""

    inv_freq: Tensor
    """fp32 [R / 2], radians per token; channels from R on are passed through."""
    scaling: float = 1.0
    """Factor on the rotated channels (YaRN's attention factor)."""
    interleaved: bool = False
    """Whether channel 2i pairs with 2i + 1 (GLM); otherwise i pairs with i + R / 2."""

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [..., D], in fp32 or wider, to `positions`, which broadcast against x without its last dim."""
        return self._rotate(x, positions, 1.0, self.scaling)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return what `apply` made x [..., D] from."""
        return self._rotate(x, positions, -1.0, 1.0 / self.scaling)

    def to(self, device: torch.device) -> "Rope":
        """Return the same rotation with its frequencies on `device`."""
        return Rope(self.inv_freq.to(device), self.scaling, self.interleaved)

    def _rotate(self, x: Tensor, positions: Tensor, sign: float, factor: float) -> Tensor:
        half = self.inv_freq.shape[0]
        if not half:
            return x
        angle = positions[..., None].to(self.inv_freq.dtype) * self.inv_freq
        cos, sin = angle.cos() * factor, angle.sin() * (sign * factor)
        turned, passed = x[..., : 2 * half], x[..., 2 * half :]
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned[..., :half], turned[..., half:]
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat((turned, passed), -1)
