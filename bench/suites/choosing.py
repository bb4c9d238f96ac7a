"""What choosing blocks takes of a step at a long context: score, select and resolve, all blocks ranked or by groups.

The configured method over random keys, with a slot for every block, so that the step has no transfer that would make
the share look small. A model of fewer layers needs less device memory for that.
"""

from bench.lab import Lab, met
from bench.ours import AllResident
from bench.selectors import Flat
from bench.suites.breakdown import STEPS, emit_parts
from bench.suites.sizes import fits_together, pool_bytes

PARTS = ("score", "decide")
SHARE = 0.10


def run(lab: Lab) -> None:
    """Emit `part.*` and `choosing_share` rows of both ways to rank."""
    batch, context = lab.scale.choosing_batch, lab.scale.long
    needed = pool_bytes(lab, batch, context, everything=True)
    if not fits_together(lab, needed):
        lab.failed("two-level", batch, context, MemoryError(f"{needed / 2**30:.0f} GiB of blocks: too many"))
        return
    for name, selection in (("flat", Flat()), ("two-level", None)):
        with lab.ours(AllResident.name, batch, context, selection) as subject:
            lab.settle(subject)
            parts = emit_parts(lab, subject, batch, context, name)
            share = sum(parts.get(part, 0.0) for part in PARTS) / parts["span"]
            fields = {"metric": "choosing_share", "unit": "1", "p50": share, "n": STEPS, **met(share, SHARE)}
            lab.emit(lab.row(subject, batch, context, name=name, **fields))
