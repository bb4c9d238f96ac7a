"""Where a step's time goes, by kernel records of replayed graphs: everything resident, with misses, as recorded."""

from bench.breakdown import step_parts
from bench.lab import Lab
from bench.ours import Rheo
from bench.selectors import Frozen

STEPS = 8
MISS_RATE = 0.05


def run(lab: Lab) -> None:
    """Emit `part.*` rows at every batch size of the misses suite."""
    context = lab.scale.short
    for batch in lab.scale.miss_batches:
        selection = Frozen(forced_misses=True)
        with lab.ours(Rheo.name, batch, context, selection, warm=False) as subject:
            lab.settle(subject)
            resident = emit_parts(lab, subject, batch, context, "frozen")
            selection.set_miss_rate(MISS_RATE)
            lab.settle(subject)
            emit_parts(lab, subject, batch, context, f"frozen-miss{MISS_RATE:g}", resident)
        try:
            recorded = lab.recorded("s64-heat")
            with lab.ours(Rheo.name, batch, context, recorded) as subject:
                lab.settle(subject)
                emit_parts(lab, subject, batch, context, "recorded", resident)
        except (FileNotFoundError, ValueError) as error:
            lab.failed("recorded", batch, context, error)


def emit_parts(
    lab: Lab, subject: Rheo, batch: int, context: int, name: str, resident: dict[str, float] | None = None
) -> dict[str, float]:
    """Emit and return the parts; beside a step without misses also what the transfer adds to attention."""
    parts = step_parts(subject, STEPS)
    if resident is not None and "attend" in parts:
        parts["exposed_transfer"] = parts["attend"] - resident["attend"]
    for part, value in parts.items():
        unit = "1" if part == "launches" else "ms"
        lab.emit(
            lab.row(
                subject,
                batch,
                context,
                name=name,
                metric=f"part.{part}",
                unit=unit,
                p50=value,
                n=STEPS,
            )
        )
    return parts
