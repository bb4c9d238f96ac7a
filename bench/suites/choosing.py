"""What choosing blocks takes of a step at a long context: score, select and resolve, all blocks ranked or by groups.

Random keys give no locality, so the configured method misses most of what it selects; the step that its choosing is a
share of is the one without misses: that of `frozen` blocks in the same run, its own choosing taken out.
"""

from typing import Any

from bench.breakdown import step_parts
from bench.lab import Lab, met
from bench.ours import Rheo
from bench.selectors import Frozen

STEPS = 8
PARTS = ("score", "decide")
SHARE = 0.10


def run(lab: Lab) -> None:
    """Emit `part.*` and `choosing_share` rows of both ways to rank."""
    batch, context = lab.scale.choosing_batch, lab.scale.long
    with lab.ours(Rheo.name, batch, context, Frozen(), warm=False) as subject:
        rest_ms = _measure(lab, subject, "frozen")["rest"]
    for index in ("flat", "two_level"):
        with lab.ours(Rheo.name, batch, context, overrides=(f"selection.index={index}",)) as subject:
            choosing_ms = _measure(lab, subject, index)["choosing"]
            share = choosing_ms / (rest_ms + choosing_ms)
            fields = {"unit": "1", "note": "of a step without misses", **met(share, SHARE)}
            _emit(lab, subject, index, metric="choosing_share", p50=share, **fields)


def _measure(lab: Lab, subject: Rheo, name: str) -> dict[str, float]:
    """Emit the parts of a step; returns what choosing takes and the rest, ms."""
    lab.settle(subject)
    parts = step_parts(subject, STEPS)
    parts.pop("launches", None)
    choosing = sum(parts.get(part, 0.0) for part in PARTS)
    found = {"choosing": choosing, "rest": parts["span"] - choosing}
    for part, ms in (parts | found).items():
        _emit(lab, subject, name, metric=f"part.{part}", p50=ms, unit="ms")
    return found


def _emit(lab: Lab, subject: Rheo, name: str, **fields: Any) -> None:
    row = lab.row(subject, lab.scale.choosing_batch, lab.scale.long, name=name, n=STEPS, **fields)
    lab.emit(row)
