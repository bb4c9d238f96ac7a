"""Tokens per second at equal device memory: the largest batch that each side fits, by arithmetic, then measured.

Device memory is weights, cache and everything else; torch is held to the cap while a case runs, and the peak is in
the row. Every row of ours has host pages of its own, so host memory caps the batch too. Where it does, the device
memory that is left over becomes pool; where it does not, fewer slots a row are tried as well, and the ratio is that of
the best (its note has the capacity). Blocks are selected as recorded from a real model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.decoder import Decoder
from bench.graphed import DenseGraph
from bench.lab import GIB, SESSION_BLOCKS, Lab, met
from bench.ours import Rheo
from bench.schema import Row
from bench.sessions import OUT_OF_MEMORY
from bench.shapes import model_bytes
from bench.suites.sizes import device_bytes, plan

SPEEDUPS = {24: 6.0, 40: 4.0, 80: 3.0}
TARGET_CONTEXT = 32768
RECORDING = "s64-heat"
RESERVE_BYTES = 5 << 27  # graphs, cuBLAS workspaces, logits, scratch; the same for both sides
RATIOS = (1.25, 1.05)
"""Capacities tried beside the configured one, where device memory caps the batch: fewer slots, more rows."""
TRIES = 4
QUICK_DENSE_ROWS = 3


def run(lab: Lab) -> None:
    """Emit both sides of every cell, and their ratio."""
    lab.reservoir.ensure(1)  # opens the store, so that its size is known
    for context in lab.scale.memory_contexts:
        host_rows = _host_rows(lab, context)
        blocks = context // lab.config.cache.block_size
        lab.reservoir.open_pages = host_rows * SESSION_BLOCKS
        lab.reservoir.ensure(blocks * host_rows)
        for cap in lab.scale.memory_caps:
            _cell(lab, context, cap, host_rows)


def _host_rows(lab: Lab, context: int) -> int:
    """Return how many rows of this length the host store holds, each with pages of its own."""
    store = lab.owner.model.rheo._store
    per_row = context // lab.config.cache.block_size + SESSION_BLOCKS
    limit = 4 if lab.device.type == "cpu" else 1024
    return max(1, min(limit, (store.max_pages - 32) // per_row))


def _cell(lab: Lab, context: int, cap: int, host_rows: int) -> None:
    dense_row = _dense_row_bytes(lab, context)
    cap = cap or _held_bytes(lab) + RESERVE_BYTES + QUICK_DENSE_ROWS * dense_row
    usable = min(cap, device_bytes(lab))
    room = usable - _held_bytes(lab) - RESERVE_BYTES
    label = f"{usable / GIB:.1f} GiB of device memory"

    def dense_case(batch: int) -> AbstractContextManager[Decoder]:
        return lab.baseline(DenseGraph, batch, context)

    dense = _run(lab, DenseGraph.name, dense_case, int(room // dense_row), context, usable, label)
    ours: list[Row] = []
    batches: set[int] = set()
    for ratio in (lab.config.cache.capacity_ratio, *RATIOS):
        device_rows = int(room // _our_row_bytes(lab, context, ratio))
        batch = min(device_rows, host_rows)
        if batch in batches:
            continue  # less room a row lets no more rows in
        batches.add(batch)
        why = "host memory" if host_rows < device_rows else "device memory"
        note = f"{label}; {why} caps the batch ({device_rows} rows by the device, {host_rows} by the host)"
        case = partial(_ours, lab, context=context, room=room, ratio=ratio)
        row = _run(lab, Rheo.name, case, batch, context, usable, note)
        ours += [row] if row else []
    if dense and ours:
        _speedup(lab, context, cap, max(ours, key=_speed), dense)


def _held_bytes(lab: Lab) -> int:
    """Return what the weights hold, with what the allocator cannot give back around them."""
    lab.free()
    reserved = torch.cuda.memory_reserved(lab.device) if lab.device.type == "cuda" else 0
    return max(model_bytes(lab.model), int(reserved))


def _dense_row_bytes(lab: Lab, context: int) -> int:
    return plan(lab, 1, context).dense_kv_bytes


def _our_row_bytes(lab: Lab, context: int, ratio: float) -> int:
    """Return the device memory of one row at a capacity, given scores and played ids included."""
    case = plan(lab, 1, context, capacity_ratio=ratio)
    heads = case.table_bytes // (8 * (case.max_blocks + case.capacity_blocks))
    played = 4 * SESSION_BLOCKS * lab.config.cache.block_size
    return case.device_kv_bytes + heads * (8 * case.max_blocks + played)


@contextmanager
def _ours(lab: Lab, batch: int, *, context: int, room: int, ratio: float) -> Iterator[Rheo]:
    """Ours with the pool grown into all that the cap leaves."""
    case = plan(lab, batch, context, capacity_ratio=ratio)
    pool = room - (batch * _our_row_bytes(lab, context, ratio) - case.pool_bytes)
    overrides = (f"cache.device_memory={max(pool, case.pool_bytes)}", f"cache.capacity_ratio={ratio}")
    store = lab.owner.model.rheo._store
    with lab.ours(
        Rheo.name, batch, context, lab.recorded(RECORDING), overrides=overrides,
        reservoir_bytes=store.max_pages * lab.page_bytes,
    ) as subject:  # fmt: skip
        lab.settle(subject)
        yield subject


def _run(
    lab: Lab,
    name: str,
    case: Callable[[int], AbstractContextManager[Decoder]],
    batch: int,
    context: int,
    usable: int,
    note: str,
) -> Row | None:
    """Measure under the cap and return the row; a batch that arithmetic got wrong shrinks, and the row says so."""
    if batch < 1:
        lab.emit(lab.row(name, 0, context, status="oom", error=f"not one row fits into {note}"))
        return None
    for attempt in range(TRIES):
        try:
            with held_to(lab, usable), case(batch) as subject:
                measured = lab.measure({subject.name: subject})[subject.name]
                row = lab.row(subject, batch, context, measured, note=note)
                row = replace(
                    row, case_id=f"{row.case_id}-cap{round(usable / GIB)}", **_facts(lab, subject, row)
                )
            if attempt:
                row = replace(row, note=f"{row.note}; {attempt} larger batches did not fit")
            lab.add_with_speed(row)
            return row
        except OUT_OF_MEMORY:
            pass
        except (FileNotFoundError, ValueError) as error:
            lab.failed(name, batch, context, error)
            return None
        lab.free()
        batch = max(1, batch - max(1, batch // 20))
    lab.emit(lab.row(name, batch, context, status="oom", error=f"nothing fitted after {TRIES} tries: {note}"))
    return None


def _facts(lab: Lab, subject: Decoder, row: Row) -> dict[str, Any]:
    """Return the measured peak, and the capacity where there is one."""
    facts: dict[str, Any] = {}
    if lab.device.type == "cuda":
        facts["peak_device_bytes"] = torch.cuda.max_memory_allocated(lab.device)
    if isinstance(subject, Rheo):
        ids = f"recorded ids ({lab.recording_of(RECORDING).stem})"
        slots, budget = subject.executor.cache.capacity, subject.executor.policy.block_budget
        facts["note"] = f"{row.note}; {ids}; {slots} slots for a budget of {budget}"
    return facts


def _speed(row: Row) -> float:
    assert row.batch and row.p50
    return row.batch / row.p50


@contextmanager
def held_to(lab: Lab, nbytes: int) -> Iterator[None]:
    """Hold torch's allocator to `nbytes` and count its peak from here."""
    if lab.device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(lab.device).total_memory
    lab.free()
    torch.cuda.reset_peak_memory_stats(lab.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), lab.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, lab.device)


def _speedup(lab: Lab, context: int, cap: int, ours: Row, dense: Row) -> None:
    ratio = _speed(ours) / _speed(dense)
    target = SPEEDUPS.get(round(cap / GIB)) if context == TARGET_CONTEXT else None
    fields = met(ratio, target, least=True) if target else {}
    lab.emit(
        replace(
            lab.row(
                Rheo.name, ours.batch, context, metric=f"speedup_over_{dense.baseline}", unit="1", p50=ratio
            ),
            case_id=ours.case_id,
            n=ours.n,
            note=f"{ours.note}; dense fits {dense.batch} rows",
            **fields,
        )  # fmt: skip
    )
