"""Against `fetch then attend` on recorded block ids, and against the dense graph while everything fits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from bench.decoder import Decoder
from bench.graphed import DenseGraph, DenseGraphStock
from bench.lab import Lab, Measured, met
from bench.ours import AllResident, FetchThenAttend, FetchThenAttendNoHeat, Rheo
from bench.suites.sizes import fits_together, pool_bytes

SPEEDUP = 2.0
RECORDINGS = {
    Rheo.name: "s64-heat",
    FetchThenAttend.name: "s64-heat",
    FetchThenAttendNoHeat.name: "s64-noheat",
}
NOTE = "recorded ids of a real model, a hash maps its layers and heads to this shape's"


def run(lab: Lab) -> None:
    """Emit both comparisons."""
    for batch in lab.scale.peer_batches:
        try:
            _fetch_then_attend(lab, batch)
        except (FileNotFoundError, ValueError) as error:
            lab.failed(FetchThenAttend.name, batch, lab.scale.short, error)
    for context in (lab.scale.short // 4, lab.scale.short):
        _dense(lab, context)


@contextmanager
def _recorded(lab: Lab, name: str, batch: int) -> Iterator[Rheo]:
    with lab.ours(name, batch, lab.scale.short, lab.recorded(RECORDINGS[name])) as subject:
        lab.settle(subject)
        yield subject


def _fetch_then_attend(lab: Lab, batch: int) -> None:
    """Ours and the peers in turns where they fit together, else one after the other."""
    context = lab.scale.short
    found: dict[str, Measured] = {}
    rows = {}
    together = fits_together(lab, 3 * pool_bytes(lab, batch, context))
    for group in [list(RECORDINGS)] if together else [[name] for name in RECORDINGS]:
        with ExitStack() as stack:
            subjects: dict[str, Decoder] = {n: stack.enter_context(_recorded(lab, n, batch)) for n in group}
            found |= lab.measure(subjects)
            for name, subject in subjects.items():
                played = lab.recording_of(RECORDINGS[name]).stem
                note = f"{NOTE} ({played})" + ("" if together else "; ran alone")
                rows[name] = lab.row(subject, batch, context, found[name], note=note)
    for row in rows.values():
        lab.add_with_speed(row)
    for peer in (FetchThenAttend.name, FetchThenAttendNoHeat.name):
        ratio = found[peer].ms / found[Rheo.name].ms
        lab.emit(
            lab.row(
                Rheo.name,
                batch,
                context,
                metric=f"speedup_over_{peer}",
                unit="1",
                p50=ratio,
                n=found[peer].times.n,
                note=NOTE,
                **met(ratio, SPEEDUP, least=True),
            )  # fmt: skip
        )


def _dense(lab: Lab, context: int) -> None:
    """B = 1, a slot for every block: there is no need to offload, and it must cost nothing."""
    with (
        lab.baseline(DenseGraph, 1, context) as dense,
        lab.baseline(DenseGraphStock, 1, context) as stock,
        lab.ours(AllResident.name, 1, context) as ours,
    ):
        subjects: dict[str, Decoder] = {s.name: s for s in (dense, stock, ours)}
        found = lab.measure(subjects)
        best = min(found[dense.name].ms, found[stock.name].ms)
        for name, subject in subjects.items():
            fields = met(found[name].ms, best) if subject is ours else {}
            lab.add_with_speed(lab.row(subject, 1, context, found[name], **fields))
