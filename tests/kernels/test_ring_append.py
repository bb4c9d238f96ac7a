"""`ring_append`: the newest R tokens of a sliding-window layer."""

import pytest
import torch

from csrc_free_kernels.reference.ring_append import ring_append as reference
from tests.helpers.homes import homes, poison
from tests.helpers.pools import assert_same_bits

# (Hkv, D, R, start, Q, dtype)
CASES = {
    "first-token": (1, 64, 8, [0], 1, torch.float32),
    "decode-inactive": (2, 80, 8, [7, 8, -1, 29], 1, torch.bfloat16),
    "wraps-round": (2, 64, 8, [5, 0], 6, torch.float32),
    "exactly-the-ring": (1, 96, 8, [3], 8, torch.float16),
    "longer-than-the-ring": (2, 64, 12, [0, -9, 5], 31, torch.float32),
    "padding-only": (1, 64, 8, [-4, -5], 4, torch.float32),
    "real-size": (1, 256, 128, [100], 40, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("op", "device"), homes("ring_append"))
def test_ring_append(op, device, case):
    heads, dim, size, start, tokens, dtype = CASES[case]
    k, v = torch.randn(len(start), tokens, 2, heads, dim).to(dtype).permute(2, 0, 3, 1, 4)

    def outcome(op, device):
        ring = poison(2, len(start), heads, size, dim, dtype=dtype, device=device)
        op(k.to(device), v.to(device), torch.tensor(start, dtype=torch.int32, device=device), *ring)
        return ring

    expected = outcome(reference, "cpu")
    assert_same_bits(outcome(op, device), expected, "ring")
    for b, first in enumerate(start):
        for t in range(max(-first, tokens - size, 0), tokens):
            assert torch.equal(expected[0, b, :, (first + t) % size], k[b, :, t])
            assert torch.equal(expected[1, b, :, (first + t) % size], v[b, :, t])


@pytest.mark.parametrize(("op", "device"), homes("ring_append"))
def test_chunks_equal_tokens(op, device):
    """Appending in uneven chunks leaves the ring of appending one by one."""
    k = torch.randn(1, 1, 23, 64, device=device)
    rings = [poison(2, 1, 1, 7, 64, dtype=torch.float32, device=device) for _ in range(2)]
    for ring, bounds in zip(rings, (range(24), (0, 3, 4, 14, 23)), strict=True):
        for begin, end in zip(bounds, bounds[1:], strict=False):
            chunk = k[:, :, begin:end]
            op(chunk, -chunk, torch.tensor([begin], dtype=torch.int32, device=device), *ring)
    assert torch.equal(*rings)
