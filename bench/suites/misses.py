"""What a miss costs: the step at m % misses minus the step at 0 %, one graph for all rates; then real selection.

Before every step, inside the graph, a share of the selected blocks that are not forced is made absent; the row at 0 %
pays for that as well. The allowance is the time of the missing bytes over the link beyond the attention over the
hits, which the transfer can hide behind, with 15 % and 5 us a layer on top.
"""

from dataclasses import replace

from bench.breakdown import step_parts
from bench.lab import FIRST_WARMUP, Lab, Measured, met
from bench.ours import AllResident, Rheo
from bench.schema import Row
from bench.selectors import Frozen
from bench.suites.sizes import fits_together, pool_bytes

SHARE = 1.15
LAYER_MS = 0.005
PROFILED_STEPS = 4


def run(lab: Lab) -> None:
    """Emit the rows of all batch sizes."""
    for batch in lab.scale.miss_batches:
        base, attend_ms = _forced(lab, batch)
        try:
            _recorded(lab, batch, base, attend_ms)
        except (FileNotFoundError, ValueError) as error:
            lab.failed("recorded", batch, lab.scale.short, error)
        _real(lab, batch)


def allowance_ms(lab: Lab, measured: Measured, attend_ms: float) -> float:
    """Return how much longer a step with these misses may take.

    Args:
        measured: the step with misses.
        attend_ms: attention over all selected blocks of a step, while all of them hit.
    """
    per_step = measured.per_step
    hits = 1 - per_step["miss_blocks"] / max(1.0, per_step["selected_blocks"])
    transfer_ms = 1e3 * per_step["h2d_bytes"] / lab.rates.link
    return SHARE * max(0.0, transfer_ms - hits * attend_ms) + LAYER_MS * lab.layers


def attention_ms(lab: Lab, subject: Rheo, batch: int, context: int) -> tuple[float, str]:
    """Return the time of attention over the hits of a step without misses, and how it was found."""
    parts = step_parts(subject, PROFILED_STEPS)
    if parts.get("attend"):
        return parts["attend"], "attention over the hits from kernel records"
    cost = lab.cost(batch, context, sparse=True)
    return 1e3 * cost.kv_bytes / lab.rates.memory, "attention over the hits by its bytes"


def _forced(lab: Lab, batch: int) -> tuple[Measured, float]:
    """Measure all rates; returns the step at 0 % and the attention over its hits, ms."""
    context, selection = lab.scale.short, Frozen(forced_misses=True)
    with lab.ours(Rheo.name, batch, context, selection, warm=False) as subject:
        lab.settle(subject)
        attend_ms, note = attention_ms(lab, subject, batch, context)
        base: Measured | None = None
        for rate in lab.scale.miss_rates:
            selection.set_miss_rate(rate)
            found = lab.measure({"forced": subject})["forced"]
            base = base or found
            achieved = found.per_step["miss_blocks"] / max(1.0, found.per_step["selected_blocks"])
            row = replace(
                lab.row(subject, batch, context, found, name="frozen"),
                forced_miss_rate=rate,
                note="; ".join(filter(None, (f"{achieved:.2%} of the selected blocks missed", subject.note))),
            )
            row = replace(row, case_id=f"{row.case_id}-miss{rate:g}")
            lab.add_with_speed(row)
            if found is not base:
                _exposed(lab, row, found, base, attend_ms, f"{row.note}; {note}: {attend_ms:.3g} ms")
        assert base is not None
        return base, attend_ms


def _exposed(lab: Lab, row: Row, found: Measured, base: Measured, attend_ms: float, note: str) -> None:
    """Emit what the misses of a step add to it."""
    exposed = found.ms - base.ms
    lab.emit(
        replace(
            row,
            metric="exposed_transfer",
            p20=None,
            p50=exposed,
            p80=None,
            floor_ms=None,
            frac_of_floor=None,
            noise_frac=None,
            note=note,
            **met(exposed, allowance_ms(lab, found, attend_ms)),
        )  # fmt: skip
    )


def _recorded(lab: Lab, batch: int, base: Measured, attend_ms: float) -> None:
    """Blocks as a real model selected them, against the fixed ones at 0 %."""
    context, name = lab.scale.short, "s64-heat"
    with lab.ours(Rheo.name, batch, context, lab.recorded(name)) as subject:
        lab.settle(subject)
        found = lab.measure({name: subject})[name]
        row = lab.row(
            subject,
            batch,
            context,
            found,
            name="recorded",
            note=f"recorded ids ({lab.recording_of(name).stem})",
        )
        lab.add_with_speed(row)
        _exposed(lab, row, found, base, attend_ms, f"{row.note}, against fixed blocks at 0 %")


def _real(lab: Lab, batch: int) -> None:
    """The configured method over random keys, against the same with everything resident where that fits."""
    context = lab.scale.short
    pools = pool_bytes(lab, batch, context) + pool_bytes(lab, batch, context, everything=True)
    with lab.ours(Rheo.name, batch, context) as subject:
        subjects = {Rheo.name: subject}
        lab.settle(subject, FIRST_WARMUP)  # of random weights: many misses, and no state that is more typical
        if not fits_together(lab, pools):
            lab.add_with_speed(
                lab.row(subject, batch, context, lab.measure(subjects)[Rheo.name], note="real selection")
            )
            return
        with lab.ours(AllResident.name, batch, context) as resident:
            subjects[AllResident.name] = resident
            found = lab.measure(subjects)
            attend_ms, note = attention_ms(lab, resident, batch, context)
            row = lab.row(subject, batch, context, found[Rheo.name], note="real selection")
            lab.add_with_speed(row)
            lab.add_with_speed(
                lab.row(resident, batch, context, found[AllResident.name], note="real selection")
            )
            text = f"real selection, against all-resident; {note}: {attend_ms:.3g} ms"
            _exposed(lab, row, found[Rheo.name], found[AllResident.name], attend_ms, text)
