"""The gather suite: scattered host blocks into pool slots, against one large copy of the same run."""

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.schema import Row
from bench.timing import Quantiles, Rates, flusher, measure_rates, time_calls
from rheo_offload.ops import kernels_for

BLOCK_KIB = (4, 16, 32)
COUNTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_COUNTS = (64, 256)
SETS = 4  # load lists of different blocks, taken in turn
NUM_KV_HEADS = 8
DTYPE = torch.bfloat16


class GatherCase:
    """Host blocks, pool and load lists of one block size and count."""

    def __init__(self, host: torch.Tensor, pool: torch.Tensor, *, block_bytes: int, count: int) -> None:
        """Carve blocks out of two flat buffers and draw `SETS` disjoint load lists.

        Args:
            host: flat pinned buffer of at least `SETS * count` blocks.
            pool: flat device buffer of at least `count + 1` blocks (slot 0 is nobody's).
            block_bytes: size of a block.
            count: blocks per load list.
        """
        elements, device = block_bytes // DTYPE.itemsize, pool.device
        pages = host.numel() // (NUM_KV_HEADS * elements)
        self.host = host[: pages * NUM_KV_HEADS * elements].view(pages, NUM_KV_HEADS, elements)
        self.pool = pool[: pool.numel() // elements * elements].view(-1, elements)
        generator = torch.Generator().manual_seed(count)
        blocks = torch.randperm(pages * NUM_KV_HEADS, generator=generator)[: SETS * count].view(SETS, count)
        self.sources = blocks.to(torch.int32).to(device)
        slots = 1 + torch.randperm(self.pool.shape[0] - 1, generator=generator)[:count]
        self.slots = slots.to(torch.int32).to(device)
        self.count = torch.tensor([count], dtype=torch.int32, device=device)
        self.loaded_total = torch.zeros(1, dtype=torch.int64, device=device)
        self.calls = 0

    def run(self, gather: Callable[..., None]) -> None:
        """Gather the next load list."""
        source = self.sources[self.calls % SETS]
        self.calls += 1
        gather(source, self.slots, self.count, self.host, self.pool, self.loaded_total)

    def problem(self, gather: Callable[..., None]) -> str:
        """Run the correctness gate on every list; returns what is wrong, or nothing."""
        for source in self.sources:
            self.pool.fill_(float("nan"))
            before = int(self.loaded_total)
            self.run(gather)
            wanted = self.host.flatten(0, 1)[source.cpu().long()].view(torch.int16)
            if not torch.equal(self.pool[self.slots.long()].cpu().view(torch.int16), wanted):
                return "the gathered blocks differ from the host blocks"
            if int(self.loaded_total) - before != len(source):
                return "loaded_total does not count the blocks"
        return ""


def _row(
    case: GatherCase, gather: Callable[..., None], rates: Rates, block_bytes: int, samples: int
) -> list[Row]:
    count, device = int(case.count), case.pool.device
    moved = count * block_bytes
    base = Row(
        suite="gather",
        case_id=f"gather-{block_bytes // 1024}KiB-x{count}",
        metric="time",
        unit="ms",
        baseline="rheo",
        bytes_moved=moved,
        flops=0,
        dtype=str(DTYPE).removeprefix("torch."),
    )
    if problem := case.problem(gather):
        return [replace(base, status="wrong", error=problem)]
    time_calls(lambda: case.run(gather), SETS, device)
    times = Quantiles.of(time_calls(lambda: case.run(gather), samples, device, before=flusher(device)))
    floor_ms = 1e3 * moved / rates.link
    base = replace(
        base, floor_ms=floor_ms, link_floor_ms=floor_ms, frac_of_floor=floor_ms / times.p50, n=times.n
    )
    gbps = times.map(lambda ms: moved / ms / 1e6)
    return [
        replace(base, p20=times.p20, p50=times.p50, p80=times.p80),
        replace(base, metric="rate", unit="GB/s", p20=gbps.p20, p50=gbps.p50, p80=gbps.p80),
    ]


def run_gather(quick: bool, device: torch.device, add: Callable[[Row], None]) -> Rates:
    """Run the suite, handing every row to `add`; returns the rates its floors are made of."""
    counts, samples = (QUICK_COUNTS, 5) if quick else (COUNTS, 30)
    largest = max(BLOCK_KIB) * 1024
    pinned = device.type == "cuda"
    host = torch.empty(SETS * max(counts) * largest // 4, dtype=torch.int32, pin_memory=pinned)
    host.random_(generator=torch.Generator().manual_seed(0))
    pool = torch.empty((max(counts) + 1) * largest // DTYPE.itemsize, dtype=DTYPE, device=device)
    rates = measure_rates(device, 2**24 if quick else 2**28)
    add(
        Row(
            suite="gather",
            case_id="large-copy",
            metric="rate",
            unit="GB/s",
            p50=rates.link / 1e9,
            n=1,
            baseline="copy",
            frac_of_floor=1.0,
        )
    )
    gather = kernels_for(device).gather
    for kib in BLOCK_KIB:
        for count in counts:
            case = GatherCase(host.view(DTYPE), pool, block_bytes=kib * 1024, count=count)
            for row in _row(case, gather, rates, kib * 1024, samples):
                add(row)
    return rates
