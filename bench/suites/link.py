"""The gather alone over the whole host store, and what it does to the kernels of a step that runs beside it."""

from dataclasses import replace

import torch
from torch import Tensor

from bench.lab import GIB, Lab, met
from bench.ours import Rheo
from bench.schema import Row
from bench.selectors import Frozen
from bench.timing import Quantiles, flusher, synchronise, time_calls
from csrc_free_kernels.gpu.gather import NUM_CTAS
from rheo_offload.cache.layout import PageLayout
from rheo_offload.model.specs import layer_specs
from rheo_offload.ops import kernels_for

SHARE = 0.92
SLOWDOWN = 0.12
MIB = (8, 16, 64, 256)
QUICK_MIB = (0.0625,)
SAMPLES = 10
LISTS = 4
BATCH = 16
STEPS = 20
AHEAD = 1.5  # gathers queued, as a multiple of the time they must cover


class StoreGather:
    """Load lists over every page of the reservoir, of the middle layer, and a pool of their own."""

    def __init__(self, lab: Lab, count: int, *, halves: bool) -> None:
        """Draw `LISTS` lists of `count` blocks; `halves`: of half blocks."""
        self.lab, self.count = lab, count
        specs, config = layer_specs(lab.model.config), lab.config
        page = PageLayout.of(specs, config.cache.block_size, lab.model.dtype)
        spec = specs[len(specs) // 2]
        elements = page.blocks[spec.layer_idx].elements
        store = lab.owner.model.rheo._store
        host = store.layer_view(
            page.layer_offsets[spec.layer_idx], (spec.num_kv_heads, elements), lab.model.dtype
        )
        parts = 2 if halves else 1
        heads = spec.num_kv_heads * parts
        self.host = host.unflatten(2, (parts, -1)).flatten(1, 2)
        self.block_bytes = elements // parts * lab.model.dtype.itemsize
        pages = torch.tensor(lab.reservoir.pages)
        generator = torch.Generator().manual_seed(count)
        drawn = torch.randint(len(pages) * heads, (LISTS, count), generator=generator)
        self.sources = (pages[drawn // heads] * heads + drawn % heads).int().to(lab.device)
        self.slots = torch.arange(1, count + 1, dtype=torch.int32, device=lab.device)
        self.pool = torch.zeros(count + 1, elements // parts, dtype=lab.model.dtype, device=lab.device)
        self.load_count = torch.tensor([count], dtype=torch.int32, device=lab.device)
        self.total = torch.zeros(1, dtype=torch.int64, device=lab.device)
        self.gather = kernels_for(lab.device).gather
        self.calls = 0

    @property
    def nbytes(self) -> int:
        """Bytes of one call."""
        return self.count * self.block_bytes

    def __call__(self) -> None:
        """Gather the next list."""
        source = self.sources[self.calls % LISTS]
        self.calls += 1
        self.gather(source, self.slots, self.load_count, self.host, self.pool, self.total)

    def problem(self) -> str:
        """Gather every list once and compare a few blocks bit by bit."""
        heads = self.host.shape[1]
        for source in self.sources:
            self()
            for i in range(0, self.count, max(1, self.count // 16)):
                page, head = divmod(int(source[i]), heads)
                if not torch.equal(_bits(self.pool[i + 1].cpu()), _bits(self.host[page, head])):
                    return f"block {i} differs from the host's"
        return ""


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def run(lab: Lab) -> None:
    """Emit the rates, then the slowdown."""
    lab.reservoir.ensure(lab.scale.reservoir_bytes // lab.page_bytes)
    is_cuda = lab.device.type == "cuda"
    for mib in MIB if is_cuda else QUICK_MIB:
        for halves in (True, False):
            _rate(lab, mib, halves)
    if is_cuda:
        _slowdown(lab)


def _rate(lab: Lab, mib: float, halves: bool) -> None:
    probe = StoreGather(lab, 1, halves=halves)
    case = StoreGather(lab, max(1, int(mib * 2**20) // probe.block_bytes), halves=halves)
    store_bytes = len(lab.reservoir.pages) * lab.page_bytes
    base = Row(
        suite=lab.suite, case_id=f"gather-{case.block_bytes // 1024}KiB-x{case.count}", metric="rate", unit="GB/s",
        baseline=Rheo.name, bytes_moved=case.nbytes, dtype=str(lab.model.dtype).removeprefix("torch."),
        floor_ms=1e3 * case.nbytes / lab.rates.link, link_floor_ms=1e3 * case.nbytes / lab.rates.link,
        note=f"{NUM_CTAS} CTAs; blocks at random over {store_bytes / GIB:.1f} GiB of host store",
    )  # fmt: skip
    if problem := case.problem():
        lab.emit(replace(base, status="wrong", error=problem))
        return
    times = Quantiles.of(time_calls(case, SAMPLES, lab.device, before=flusher(lab.device)))
    rate = times.map(lambda ms: case.nbytes / ms / 1e6)
    lab.emit(
        replace(
            base,
            p20=rate.p20,
            p50=rate.p50,
            p80=rate.p80,
            n=rate.n,
            frac_of_floor=(base.floor_ms or 0) / times.p50,
            **met(rate.p50, SHARE * lab.rates.link / 1e9, least=True),
        )  # fmt: skip
    )


def _slowdown(lab: Lab) -> None:
    """Time steps that miss nothing, alone and while a gather runs on another stream from beginning to end."""
    context = lab.scale.short
    case = StoreGather(
        lab, int(MIB[-1] * 2**20) // StoreGather(lab, 1, halves=False).block_bytes, halves=False
    )
    with lab.ours(Rheo.name, BATCH, context, Frozen(), warm=False) as subject:
        alone = lab.measure({"frozen": subject})["frozen"]
        lab.emit(lab.row(subject, BATCH, context, alone, name="frozen", note="alone"))
        gather_ms = Quantiles.of(time_calls(case, SAMPLES, lab.device)).p50
        calls = int(AHEAD * STEPS * alone.ms / gather_ms) + 2
        times, covered, rate = _beside(lab, subject, case, calls)
        slower = times.p50 / alone.ms - 1
        note = f"a gather of {rate:.1f} GB/s on another stream" + (
            "" if covered else "; it ended before the steps did"
        )
        row = lab.row(subject, BATCH, context, name="frozen-beside-gather", note=note)
        lab.emit(replace(row, p20=times.p20, p50=times.p50, p80=times.p80, n=times.n))
        fields = met(slower, SLOWDOWN) if covered else {}
        lab.emit(replace(row, metric="slowdown", unit="1", p50=slower, n=times.n, **fields))


def _beside(lab: Lab, subject: Rheo, case: StoreGather, calls: int) -> tuple[Quantiles, bool, float]:
    """Return the step times, whether the gathers outlasted them, and the gathers' GB/s."""
    side = torch.cuda.Stream(lab.device)

    def mark(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream(lab.device))
        return event

    synchronise(lab.device)
    first = mark(side)
    with torch.cuda.stream(side):
        for _ in range(calls):
            case()
    last = mark(side)
    marks = [mark()]
    for _ in range(STEPS):
        subject.step()
        marks.append(mark())
    synchronise(lab.device)
    times = Quantiles.of([a.elapsed_time(b) for a, b in zip(marks[1:], marks[2:], strict=False)])
    return times, marks[-1].elapsed_time(last) > 0, calls * case.nbytes / first.elapsed_time(last) / 1e6
