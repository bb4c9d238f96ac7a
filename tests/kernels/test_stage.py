"""`stage`: a run of blocks of every (row, head), from the pool or the host."""

import pytest
import torch

from csrc_free_kernels.reference.stage import stage as reference
from tests.helpers.homes import homes, poison
from tests.helpers.pools import assert_same_bits, make_pools

# (Hkv, D, C, hist_lens, first_block, M, dtype, make_pools options)
CASES = {
    "one-token": (1, 64, 8, [1], 0, 2, torch.float32, {}),
    "exactly-one-block": (2, 64, 8, [8], 0, 2, torch.float32, {}),
    "ragged-inactive": (2, 80, 8, [33, 0, 9, 17], 1, 3, torch.bfloat16, {}),
    "nothing-resident": (1, 96, 8, [30], 0, 4, torch.float16, {"resident": 0.0, "tail_resident": False}),
    "all-resident": (1, 64, 8, [30], 0, 4, torch.float32, {"resident": 1.0, "slots": 4}),
    "beyond-the-table": (2, 64, 8, [30, 12], 2, 6, torch.float32, {}),
    "trailer": (1, 64, 8, [20], 0, 3, torch.bfloat16, {"trailer": 2}),
    "real-size": (2, 128, 64, [200], 1, 3, torch.bfloat16, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("op", "device"), homes("stage"))
def test_stage(op, device, case):
    heads, dim, size, hist_lens, first, num, dtype, options = CASES[case]
    pools = make_pools(heads, dim, size, hist_lens, dtype=dtype, **{"slots": 3, **options})
    # what the pool holds is told from what the host holds
    pools.pool += 1

    def outcome(op, device):
        p = pools.copy(device)
        staging = poison(len(hist_lens), heads, num, pools.pool.shape[1], dtype=dtype, device=device)
        total = torch.tensor([2**40], dtype=torch.int64, device=device)
        op(
            first, p.seq_lens, p.host_table, p.slot_of, p.host_blocks, p.pool_blocks, staging, total,
            block_size=size,
        )  # fmt: skip
        return staging, total.cpu()

    expected, expected_total = outcome(reference, "cpu")
    got, total = outcome(op, device)
    assert_same_bits(got, expected, "staging")
    assert torch.equal(total, expected_total)

    from_host = 0
    for b, length in enumerate(hist_lens):
        for h in range(heads):
            for j in range(num):
                block = first + j
                if block * size >= length:
                    assert torch.isnan(expected[b, h, j]).all()
                    continue
                slot, page = int(pools.slot_of[b, h, block]), int(pools.host_table[b, block])
                source = pools.pool[slot] if slot >= 0 else pools.host_blocks[page, h]
                assert_same_bits(expected[b, h, j], source, "block")
                from_host += slot < 0
    assert int(total) == 2**40 + from_host
