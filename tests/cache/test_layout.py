"""Where a block's bytes are: keys, values and, where a method has one, a bias per token."""

import pytest
import torch

from rheo_offload.cache.layout import BlockLayout, PageLayout
from rheo_offload.types import LayerSpec


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 8), (64, 80), (256, 128)])
def test_the_parts_fill_a_block_and_blocks_stay_aligned(block_size, head_dim, dtype, has_bias):
    layout = BlockLayout(block_size, head_dim, dtype, has_bias)
    blocks = torch.arange(3 * layout.elements).view(3, layout.elements)
    k, v = layout.split(blocks)
    bias = layout.bias(blocks)
    parts = [k.flatten(1), v.flatten(1)] + ([bias] if has_bias else [])
    assert (bias is not None) == has_bias and torch.equal(torch.cat(parts, 1), blocks)
    assert k.shape == v.shape == (3, block_size, head_dim)
    assert layout.block_bytes == layout.elements * dtype.itemsize and layout.block_bytes % 16 == 0


def test_a_page_holds_the_bias_of_every_head_and_layer():
    specs = [LayerSpec(layer_idx=i, num_q_heads=4, num_kv_heads=2, head_dim=16) for i in range(3)]
    plain, biased = (PageLayout.of(specs, 64, torch.bfloat16, has_bias=b) for b in (False, True))
    assert biased.page_bytes - plain.page_bytes == 3 * 2 * 64 * 2
    assert biased.layer_offsets[2] == 2 * 2 * (2 * 64 * 16 + 64) * 2
