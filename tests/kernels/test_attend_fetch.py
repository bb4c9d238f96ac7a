"""attend_fetch, then merge: all selected blocks, as if nothing had been missing."""

import importlib

import pytest
import torch

from csrc_free_kernels.reference.attend import attend as reference_attend
from csrc_free_kernels.reference.merge import merge as reference_merge
from tests.helpers.homes import DEVICE, poison
from tests.helpers.tolerance import assert_close
from tests.kernels.test_attend import bias_of, inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: Hkv, G, D, C, S, splits, parts for loads, seq_lens, dtype, soft_cap, sinks, share of missing blocks
CASES = {
    "one-block": (1, 1, 64, 16, 2, 1, 2, [5], FP32, None, False, 1.0),
    "ragged": (2, 4, 64, 16, 5, 2, 5, [70, 0, 33, 16], FP32, None, False, 0.5),
    "parts-of-two": (2, 4, 64, 16, 7, 3, 4, [100, 0, 33], FP32, None, True, 0.7),
    "one-part-for-all": (1, 2, 32, 16, 6, 1, 1, [90, 17], FP32, 30.0, False, 0.8),
    "none": (2, 7, 80, 16, 5, 3, 5, [70, 0], FP32, None, True, 0.0),
    "all": (1, 3, 64, 16, 3, 2, 3, [40, 0], FP32, None, True, 1.0),
    "more-loads-than-programs": (3, 2, 16, 16, 24, 2, 24, [350, 360, 33], FP32, None, False, 0.9),
    "blocks-beyond-registers": (1, 2, 256, 64, 4, 1, 4, [200], FP32, None, False, 0.9),
    "bf16": (2, 8, 128, 64, 3, 2, 3, [190, 65], BF16, None, True, 0.6),
    "bf16-wide-head": (1, 4, 256, 16, 4, 1, 2, [63], BF16, None, False, 0.5),
    "bias": (2, 4, 64, 16, 7, 3, 4, [100, 0, 33], FP32, None, True, 0.7),
    "bias-bf16": (2, 8, 128, 64, 3, 2, 3, [190, 65], BF16, 30.0, False, 0.6),
    "fp16-wide-group": (1, 20, 64, 16, 4, 2, 4, [50], FP16, 5.0, False, 0.5),
}


def op_of(home, op):
    return getattr(importlib.import_module(f"csrc_free_kernels.{home}.{op}"), op)


class World:
    """Selected blocks over a NaN pool; some of them are on the host only, on pages of their own."""

    def __init__(self, case: str) -> None:
        heads, group, dim, size, width, splits, spare, seq_lens, dtype, cap, sink, missing = CASES[case]
        self.heads, self.splits, self.spare = heads, splits, spare
        self.q, k, v, self.ids, self.slots, self.lens = inputs(
            len(seq_lens), heads, group, dim, size, width, seq_lens, dtype, absent=0
        )
        miss = (torch.rand(self.slots.shape) < missing) & (self.slots >= 0)
        self.block = (size, dim)
        self.whole = torch.cat([k.flatten(1), v.flatten(1)], 1)  # [L, E], everything resident
        if case.startswith("bias"):
            self.whole = torch.cat([self.whole, bias_of(k, dtype)], 1)
        self.hits, self.late = self.slots.masked_fill(miss, -1), self.slots.masked_fill(~miss, -1)
        self.sinks = torch.randn(heads * group).to(dtype) if sink else None
        self.kw = {"softmax_scale": dim**-0.5, "soft_cap": cap, "window": None}
        self.kw |= {"bias_scale": 0.7} if case.startswith("bias") else {}
        self.pool = self.whole.clone()
        self._list_loads(miss.nonzero(), width)

    def _list_loads(self, where, width):
        """Pairs in any order, the loads of each together."""
        pages = torch.randperm(len(where)) + 2
        self.host = torch.full((len(where) + 3, self.heads, *self.whole.shape[1:]), torch.nan).to(
            self.q.dtype
        )
        pair = where[:, 0] * self.heads + where[:, 1]
        order = torch.argsort(torch.randperm(self.slots.shape[0] * self.heads)[pair], stable=True)
        self.lists = [torch.full((self.slots.numel(),), -77, dtype=torch.int32) for _ in range(3)]
        self.count = torch.tensor([len(where)], dtype=torch.int32)
        ranks: dict[int, int] = {}
        for i, n in enumerate(order.tolist()):
            (b, h, s), page = where[n].tolist(), int(pages[n])
            slot = int(self.slots[b, h, s])
            self.host[page, h], self.pool[slot] = self.whole[slot], torch.nan
            rank = ranks[b * self.heads + h] = ranks.get(b * self.heads + h, -1) + 1
            entry = (page * self.heads + h, slot, (b * self.heads + h) * width + rank)
            for part, value in zip(self.lists, entry, strict=True):
                part[i] = value

    def parts_of(self, pool):
        """Keys and values of a pool [L, E], and what more attention takes."""
        cells = self.block[0] * self.block[1]
        k, v = (pool[:, i * cells : (i + 1) * cells].unflatten(1, self.block) for i in (0, 1))
        return k, v, self.kw | ({"bias_pool": pool[:, 2 * cells :]} if "bias_scale" in self.kw else {})

    def run(self, home, device, *, wide=False):
        """Returns out, lse and the pool after `attend_fetch` and `merge` of a home."""

        def move(t):
            t = t.double() if wide and t.is_floating_point() else t
            return t.to(device, copy=True)

        accumulated = torch.float64 if wide else FP32
        pool, host, late = move(self.pool), move(self.host), move(self.late)
        parts = poison(self.splits + self.spare, *self.q.shape, dtype=accumulated, device=device)
        lses = poison(*parts.shape[:3], dtype=accumulated, device=device)
        out = poison(*self.q.shape, dtype=torch.float64 if wide else self.q.dtype, device=device)
        lse = poison(*self.q.shape[:2], dtype=accumulated, device=device)
        total = torch.full((1,), 2**33, dtype=torch.int64, device=device)
        k, v, kw = self.parts_of(pool)
        op_of(home, "attend_fetch")(
            move(self.q), k, v, move(self.ids), move(self.hits), late, move(self.lens),
            *(move(t) for t in self.lists), move(self.count), host, pool, total,
            self.splits, parts, lses, **kw,
        )  # fmt: skip
        sinks = None if self.sinks is None else move(self.sinks)
        op_of(home, "merge")(parts, lses, sinks, out, lse, splits=self.splits, late_slots=late)
        assert int(total) == 2**33 + int(self.count)
        return out.cpu(), lse.cpu(), pool.cpu()

    def truth(self):
        """Attention over all selected blocks of the whole pool, in fp64."""
        q, whole = self.q.double(), self.whole.double()
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float64)
        parts, lses = torch.empty(1, *q.shape).double(), torch.empty(1, *q.shape[:2]).double()
        k, v, kw = self.parts_of(whole)
        reference_attend(q, k, v, self.ids, self.slots, self.lens, parts, lses, **kw)
        reference_merge(parts, lses, None if self.sinks is None else self.sinks.double(), out, lse)
        return out, lse


HOMES = pytest.mark.parametrize(
    ("home", "device"),
    [("gpu", DEVICE), ("cpu", "cpu"), ("reference", "cpu")],
    ids=["triton", "numba", "reference"],
)


@pytest.mark.parametrize("case", CASES)
@HOMES
def test_as_if_nothing_had_been_missing(home, device, case):
    world = World(case)
    plain, truth = world.run("reference", "cpu"), world.truth()
    out, lse, pool = world.run(home, device)
    assert_close(out, truth[0], plain[0], world.q.dtype)
    assert_close(lse, truth[1], plain[1], world.q.dtype)
    assert torch.equal(pool.nan_to_num(-1), world.whole.nan_to_num(-1)), "every block is where it belongs"


@HOMES
def test_nan_among_the_loads_reaches_the_result(home, device):
    world = World("all")
    world.host[int(world.lists[0][0]) // world.heads] = torch.nan
    out, lse, _ = world.run(home, device)
    assert torch.isnan(out).any() and torch.isnan(lse).any()
