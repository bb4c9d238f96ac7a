"""Where a KV block's bytes are. No other module knows.

block = [ K: C x D | V: C x D | bias: C ]               one KV head, contiguous on both sides; a bias if needed
page  = [ layer 0: Hkv blocks | layer 1: Hkv blocks ...] one logical block of one row, every offloaded layer
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rheo_offload.types import LayerSpec

# Start of every layer inside a page, so that 16-byte accesses stay aligned whatever the head dims.
LAYER_ALIGN_BYTES = 128


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One KV block: `block_size` keys, then as many values, then (with `has_bias`) one number per token."""

    block_size: int
    head_dim: int
    dtype: torch.dtype
    has_bias: bool = False
    """Whether a bias per token travels with the block: at least 16 tokens of 2 bytes, so that blocks stay aligned."""

    @property
    def elements(self) -> int:
        """Elements of a block (K, V and bias)."""
        return self.block_size * (2 * self.head_dim + self.has_bias)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.elements * self.dtype.itemsize

    def split(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """View raw blocks [..., E] as keys and values [..., C, D] each, without a copy."""
        half = self.block_size * self.head_dim
        shape = (self.block_size, self.head_dim)
        return blocks[..., :half].unflatten(-1, shape), blocks[..., half : 2 * half].unflatten(-1, shape)

    def bias(self, blocks: torch.Tensor) -> torch.Tensor | None:
        """View the bias of raw blocks [..., E] as [..., C], without a copy; None where there is none."""
        return blocks[..., -self.block_size :] if self.has_bias else None


@dataclass(frozen=True, slots=True)
class PageLayout:
    """One host page: the blocks of every offloaded layer, layer by layer."""

    layer_offsets: dict[int, int]
    """layer_idx -> bytes from the start of the page."""
    blocks: dict[int, BlockLayout]
    page_bytes: int

    @classmethod
    def of(
        cls, specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype, *, has_bias: bool = False
    ) -> "PageLayout":
        """Lay out a page for the full-attention layers among `specs`."""
        offsets, blocks, end = {}, {}, 0
        for spec in specs:
            if spec.is_sliding:
                continue
            block = BlockLayout(block_size, spec.head_dim, dtype, has_bias)
            offsets[spec.layer_idx], blocks[spec.layer_idx] = end, block
            end += spec.num_kv_heads * block.block_bytes
            end = -(-end // LAYER_ALIGN_BYTES) * LAYER_ALIGN_BYTES
        return cls(offsets, blocks, end)


def ring_tokens(window: int, block_size: int) -> int:
    """Return the ring length in tokens of a sliding layer: whole blocks, and one block of slack for `crop`."""
    return (-(-window // block_size) + 1) * block_size
