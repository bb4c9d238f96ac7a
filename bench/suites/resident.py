"""A step while nothing is fetched, selection included, against the attention-free step of the same run.

Two selections: the configured method over an `all-resident` cache where every block has a slot and the device holds
that, and `frozen` at the configured capacity: fixed random blocks, which are resident after the first step, with the
real scoring paid for. Then the same at a long context.
"""

from contextlib import ExitStack

from bench.decoder import Decoder
from bench.graphed import NoAttentionGraph, NoAttentionGraphStock
from bench.lab import Lab, Measured, met
from bench.ours import AllResident, Rheo
from bench.selectors import Frozen
from bench.suites.sizes import fits_together, pool_bytes

ATTENTION_SHARE = 1.10
LAYER_MS = 0.012
LONG_RATIO = 1.10


def run(lab: Lab) -> None:
    """Emit the rows of all batch sizes, then long against short."""
    for batch in lab.scale.resident_batches:
        _batch(lab, batch)
    _long(lab)


def target_ms(lab: Lab, subject: Rheo, batch: int, context: int, model: Measured) -> float:
    """Return what the step should take, from the attention-free step of the same batch."""
    cost = lab.cost(batch, context, sparse=True, distinct=getattr(subject, "distinct_rows", None))
    attention_ms = 1e3 * (cost.kv_bytes + cost.summary_bytes) / lab.rates.memory
    return model.ms + ATTENTION_SHARE * attention_ms + LAYER_MS * lab.layers


def _batch(lab: Lab, batch: int) -> None:
    context = lab.scale.short
    pools = [pool_bytes(lab, batch, context), pool_bytes(lab, batch, context, everything=True)]
    with ExitStack() as stack:
        subjects: dict[str, Decoder] = {
            kind.name: stack.enter_context(lab.baseline(kind, batch, context))
            for kind in (NoAttentionGraph, NoAttentionGraphStock)
        }
        subjects["frozen"] = stack.enter_context(lab.ours(Rheo.name, batch, context, Frozen(), warm=False))
        if fits_together(lab, sum(pools)):
            subjects[AllResident.name] = stack.enter_context(lab.ours(AllResident.name, batch, context))
        found = lab.measure(subjects)
        for name, subject in subjects.items():
            fields = {}
            if isinstance(subject, Rheo):
                fields = met(
                    found[name].ms, target_ms(lab, subject, batch, context, found[NoAttentionGraph.name])
                )
            lab.add_with_speed(
                lab.row(subject, batch, context, found[name], name=name, note=_what(name), **fields)
            )
        if AllResident.name not in subjects:
            lab.say(f"all-resident does not fit at B={batch}: {pools[1] / 2**30:.0f} GiB of blocks")


def _what(name: str) -> str:
    return "fixed random blocks, all resident; scoring paid for" if name == "frozen" else ""


def _long(lab: Lab) -> None:
    batch, contexts = lab.scale.long_batch, (lab.scale.short, lab.scale.long)
    with ExitStack() as stack:
        subjects = {
            context: stack.enter_context(lab.ours(Rheo.name, batch, context, Frozen(), warm=False))
            for context in contexts
        }
        found = lab.measure({str(context): subject for context, subject in subjects.items()})
        short = found[str(contexts[0])]
        for context, subject in subjects.items():
            fields = met(found[str(context)].ms, LONG_RATIO * short.ms) if context == contexts[1] else {}
            lab.emit(
                lab.row(
                    subject,
                    batch,
                    context,
                    found[str(context)],
                    name="frozen",
                    note=_what("frozen"),
                    **fields,
                )
            )
        ratio = found[str(contexts[1])].ms / short.ms
        lab.emit(
            lab.row(
                "frozen",
                batch,
                contexts[1],
                metric="long_over_short",
                unit="1",
                p50=ratio,
                n=short.times.n,
                note=f"step at {contexts[1]} tokens over step at {contexts[0]}",
                **met(ratio, LONG_RATIO),
            )  # fmt: skip
        )
