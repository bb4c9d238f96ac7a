"""Dirty host stores, device pools and tables for kernel tests.

Every token that exists is random and everything else is NaN, so a kernel that reads what it must not shows
it. Pages and slots are shuffled; the host store is one layer of two, so that its page stride is not its
page size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tests.helpers.tolerance import assert_close

LAYERS, LAYER = 2, 1
SPARE = 2  # host pages and slots that belong to nobody, besides scratch 0


@dataclass
class Pools:
    """The cache of one layer (words: csrc_free_kernels/README.md); `host` and `pool` own the memory."""

    host: Tensor  # [P, layers, Hkv, E]
    pool: Tensor  # [L, E]
    host_table: Tensor
    slot_of: Tensor
    block_in: Tensor
    last_used: Tensor
    slot_base: Tensor
    slot_count: Tensor
    seq_lens: Tensor
    step: Tensor
    block_size: int
    head_dim: int

    @property
    def host_blocks(self) -> Tensor:
        return self.host[:, LAYER]

    @property
    def pool_blocks(self) -> Tensor:
        return self.pool

    @property
    def k_host(self) -> Tensor:
        return self._part(self.host_blocks, 0)

    @property
    def v_host(self) -> Tensor:
        return self._part(self.host_blocks, 1)

    @property
    def bias_host(self) -> Tensor:
        """The first numbers behind K and V, one a token: needs a trailer of at least `block_size`."""
        return self._trailer(self.host_blocks)

    @property
    def bias_pool(self) -> Tensor:
        return self._trailer(self.pool)

    @property
    def k_pool(self) -> Tensor:
        return self._part(self.pool, 0)

    @property
    def v_pool(self) -> Tensor:
        return self._part(self.pool, 1)

    def _trailer(self, blocks: Tensor) -> Tensor:
        first = 2 * self.block_size * self.head_dim
        return blocks[..., first : first + self.block_size]

    def _part(self, blocks: Tensor, which: int) -> Tensor:
        size = self.block_size * self.head_dim
        return blocks[..., which * size : (which + 1) * size].unflatten(-1, (self.block_size, self.head_dim))

    def copy(self, device: str, dtype: torch.dtype | None = None) -> "Pools":
        """A deep copy on `device`, the host store in pinned memory when that is CUDA."""
        changed: dict[str, Any] = {}
        for f in fields(self):
            t = getattr(self, f.name)
            if isinstance(t, Tensor):
                t = t.to(dtype) if dtype is not None and t.dtype.is_floating_point else t
                t = t.clone() if f.name == "host" else t.to(device, copy=True)
                changed[f.name] = t.pin_memory() if f.name == "host" and device == "cuda" else t
        return replace(self, **changed)


def make_pools(
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    seq_lens: Sequence[int],
    *,
    slots: int,
    dtype: torch.dtype,
    new_tokens: int = 0,
    resident: float = 0.6,
    tail_resident: bool = True,
    step: int = 7,
    trailer: int = 0,
) -> Pools:
    """Build pools on the CPU whose rows hold `seq_lens - new_tokens` tokens and have pages for `seq_lens`.

    Args:
        num_kv_heads: Hkv.
        head_dim: D.
        block_size: C, tokens.
        seq_lens: tokens of every row, those about to be appended included; 0 = inactive.
        slots: slots of every (row, head).
        dtype: of K and V.
        new_tokens: how many of the last tokens do not exist yet.
        resident: share of the blocks that the pool holds, as far as there are slots.
        tail_resident: whether the last block that holds a token is among them.
        step: the current step; resident blocks were used in earlier ones, ties included.
        trailer: extra elements of a block behind K and V.
    """
    rows, num_blocks = len(seq_lens), max(-(-max(seq_lens) // block_size), 1) + 1
    pages = sum(-(-n // block_size) for n in seq_lens) + 1 + SPARE
    total_slots = rows * num_kv_heads * slots + 1 + SPARE
    elements = 2 * block_size * head_dim + trailer
    heads = (rows, num_kv_heads)
    pools = Pools(
        host=torch.full((pages, LAYERS, num_kv_heads, elements), float("nan"), dtype=dtype),
        pool=torch.full((total_slots, elements), float("nan"), dtype=dtype),
        host_table=torch.full((rows, num_blocks), -1, dtype=torch.int32),
        slot_of=torch.full((*heads, num_blocks), -1, dtype=torch.int32),
        block_in=torch.full((total_slots,), -1, dtype=torch.int32),
        last_used=torch.zeros(total_slots, dtype=torch.int32),
        slot_base=(torch.randperm(rows * num_kv_heads) * slots + 1).view(heads).int(),
        slot_count=torch.full(heads, slots, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        step=torch.tensor([step], dtype=torch.int32),
        block_size=block_size,
        head_dim=head_dim,
    )
    free_pages = iter((torch.randperm(pages - 1) + 1).tolist())
    for b, seq_len in enumerate(seq_lens):
        tokens = seq_len - new_tokens
        for n in range(-(-seq_len // block_size)):
            pools.host_table[b, n] = page = next(free_pages)
            present = min(max(tokens - n * block_size, 0), block_size)
            for part in (pools.k_host, pools.v_host):
                part[page, :, :present] = torch.randn(num_kv_heads, present, head_dim).to(dtype)
            if trailer and present:
                pools.host_blocks[page, :, -trailer:] = torch.randn(num_kv_heads, trailer).to(dtype)
        for h in range(num_kv_heads):
            _fill_slots(pools, b, h, -(-tokens // block_size), resident, tail_resident)
    return pools


def _fill_slots(pools: Pools, b: int, h: int, blocks: int, resident: float, tail_resident: bool) -> None:
    if blocks <= 0:
        return
    own = int(pools.slot_base[b, h]) + torch.randperm(int(pools.slot_count[b, h]))
    chosen = [n for n in torch.randperm(blocks - 1).tolist() if torch.rand(()) < resident]
    chosen = [blocks - 1] * tail_resident + chosen
    for n, slot in zip(chosen, own.tolist(), strict=False):
        pools.slot_of[b, h, n], pools.block_in[slot] = slot, n
        pools.last_used[slot] = torch.randint(0, max(int(pools.step) // 2, 1), ())
        pools.pool[slot] = pools.host_blocks[int(pools.host_table[b, n]), h]


def assert_same(got: Pools, expected: Pools) -> None:
    """Every tensor equal bit for bit, NaN included; and `slot_of` and `block_in` are each other's inverse."""
    if got.pool.is_cuda:
        torch.cuda.synchronize()  # the host store is written by kernels
    for f in fields(got):
        x, y = getattr(got, f.name), getattr(expected, f.name)
        if isinstance(x, Tensor):
            assert_same_bits(x, y, f.name)
    for b, h, n in (got.slot_of >= 0).nonzero().tolist():
        assert int(got.block_in[int(got.slot_of[b, h, n])]) == n, (
            f"slot_of[{b}, {h}, {n}] points to another block"
        )
    assert int((got.block_in >= 0).sum()) == int((got.slot_of >= 0).sum()), (
        "a slot holds a block nobody knows of"
    )


def assert_same_bits(got: Tensor, expected: Tensor, name: str) -> None:
    """Equal bit for bit, NaN included."""
    got, expected = got.detach().cpu(), expected.detach().cpu()
    assert got.dtype == expected.dtype
    if got.dtype.is_floating_point:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
        got, expected = got.contiguous().view(bits), expected.contiguous().view(bits)
    where = (got != expected).nonzero()
    assert len(where) == 0, f"{name} differs at {len(where)} places, first {where[0].tolist()}"


def assert_close_where_written(got: Tensor, truth: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """The same elements are written (not NaN), and those agree by the tolerance rule."""
    written = ~torch.isnan(truth)
    assert torch.equal(~torch.isnan(got.cpu()), written), "written at other places"
    assert_close(got.cpu()[written], truth[written], plain[written], dtype)
