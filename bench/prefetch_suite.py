"""`python -m bench prefetch`: recorded block ids replayed under every policy and pool size."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.prefetch import Traffic, Window, capacity_slots, replay, warm_blocks
from bench.prefetch_policies import (
    POLICIES,
    Guesses,
    earlier_layer,
    geometry_of,
    phases_of,
    query_blocks,
    worth_of,
)
from bench.prefetch_time import Machine, exposed_ms
from bench.recorded import Recording
from bench.schema import Row

BATCHES = (1, 16, 64)
SKIP = 64
"""Steps left out of every figure: what the pool holds right after a prompt is not what it holds later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One recording, its scores if they are there, and what its rows share."""

    name: str
    recording: Recording
    scores: dict[str, NDArray[np.float32]] | None
    skip: int = SKIP

    @classmethod
    def load(cls, path: Path, scores_folder: Path | None, skip: int = SKIP) -> "Case":
        """Read `NAME.npz` and, when the folder is given, `NAME.scores.npz` there."""
        scores = None
        if scores_folder is not None:
            with np.load(scores_folder / f"{path.stem}.scores.npz") as file:
                scores = {name: file[name] for name in file.files}
        return cls(name=path.stem, recording=Recording.load(path), scores=scores, skip=skip)

    def row(self, what: str, metric: str, unit: str, value: float, **extra: Any) -> Row:
        """Return a row; its p50 is a mean over streams and steps."""
        meta, recording = self.recording.meta, self.recording
        return Row(
            suite="prefetch",
            case_id=f"{self.name}-{what}",
            metric=metric,
            unit=unit,
            p50=value,
            n=recording.streams * (recording.recorded_steps - self.skip),
            model=meta["model"],
            dtype="float32",
            context_len_tokens=meta["start_tokens"] + recording.recorded_steps,
            block_size=meta["block_size"],
            token_budget=recording.block_budget * meta["block_size"],
            method=meta["method"],
            fill="recorded",
            **extra,
        )


SELECTIONS = {
    "late": "attend without the blocks that are absent; they arrive for the next step",
    "select-step-old": "select for the query of the step before: everything is known a step early",
    "select-ahead-1": "select for the query guessed one layer ahead: everything is known a layer early",
    "select-previous-layer": "take the ids of the full-attention layer before (not in the first one)",
}
"""No step waits for a block: what is attended depends on what is there or known in time. Not exact."""


def replay_all(case: Case, policy: str, ratio: float, guesses: Guesses | None) -> list[Traffic] | None:
    """Replay every stream of a recording; None when it cannot tell what the policy would fetch."""
    recording, geometry = case.recording, geometry_of(case.recording)
    capacity = capacity_slots(recording.block_budget, ratio)
    if policy.startswith("evict") and guesses is None:
        return None
    traffic = []
    for stream in range(recording.streams):
        ids, window, phases = recording.base[stream].astype(np.int64), None, None
        if policy not in SELECTIONS:
            phases = phases_of(policy, stream, recording, guesses)
        elif (other := otherwise(policy, stream, recording, guesses)) is not None:
            (ids, window), phases = other, []
        if phases is None:
            return None
        found = replay(
            ids,
            geometry,
            capacity=capacity,
            num_blocks=recording.context_blocks,
            warm=warm_blocks(geometry, recording.start_order[stream], capacity),
            phases=phases,
            worth=None if policy in SELECTIONS else worth_of(policy, stream, recording, guesses),
        )
        traffic.append(found if window is None else found.known_early(window))
    return traffic


def otherwise(
    policy: str, stream: int, recording: Recording, guesses: Guesses | None
) -> tuple[NDArray[np.int64], Window | None] | None:
    """Return what a policy of SELECTIONS asks the pool for in a stream [steps, S], and how early it is known.

    None when the recording cannot tell.
    """
    if policy == "late":
        return recording.base[stream].astype(np.int64), "step"
    if policy == "select-previous-layer":
        earlier = earlier_layer(recording, stream)
        ids = recording.base[stream if earlier is None else earlier].astype(np.int64)
        return ids, None if earlier is None else "layer"
    if guesses is None:
        return None
    return (
        (guesses.step_old[stream], "step")
        if policy == "select-step-old"
        else (guesses.ahead[1][stream], "layer")
    )


def figures(case: Case, traffic: Sequence[Traffic]) -> dict[str, float]:
    """Return blocks per (row, layer, KV head) and step, and shares, over the steps that count."""
    recording, skip = case.recording, case.skip
    demand = np.stack([t.demand for t in traffic])[:, skip:]
    early = sum(np.stack([t.early[w] for t in traffic])[:, skip:] for w in ("step", "layer"))
    all_early = sum(int(part.sum()) for t in traffic for part in t.early.values())
    return {
        "demand": float(demand.mean()),
        "miss_rate": float(demand.mean() / (recording.block_budget - 1)),  # without the tail
        "link": float((demand + early).mean()),
        "useful": sum(t.useful for t in traffic) / all_early if all_early else float("nan"),
    }


def policy_rows(
    case: Case, ratios: Sequence[float], policies: Sequence[str], guesses: Guesses | None
) -> Iterator[tuple[float, str, dict[str, float], list[Row]]]:
    """Replay policies x pool sizes; `lru` comes first and is what extra bytes are counted against."""
    ordered = ["lru", *(p for p in policies if p != "lru")]
    for ratio in ratios:
        plain = 0.0
        for policy in ordered:
            traffic = replay_all(case, policy, ratio, guesses)
            if traffic is None:
                continue
            found = figures(case, traffic)
            plain = found["link"] if policy == "lru" else plain
            found["extra"] = found["link"] / plain - 1 if plain else 0.0
            yield (
                ratio,
                policy,
                found,
                [*_block_rows(case, ratio, policy, found), *_time_rows(case, ratio, policy, found, traffic)],
            )


def _block_rows(case: Case, ratio: float, policy: str, found: dict[str, float]) -> Iterator[Row]:
    metrics = {
        "demand": ("demand_misses_per_step", "blocks"),
        "link": ("link_blocks_per_step", "blocks"),
        "extra": ("extra_bytes", "share of lru"),
        "useful": ("useful_prefetch", "share"),
    }
    for key, (metric, unit) in metrics.items():
        if found[key] == found[key]:  # useful is NaN where nothing was fetched ahead
            hits = {"hit_rate": 1 - found["miss_rate"]} if key == "demand" else {}
            yield case.row(f"c{ratio}-{policy}", metric, unit, found[key], baseline=policy, **hits)


def _time_rows(
    case: Case, ratio: float, policy: str, found: dict[str, float], traffic: Sequence[Traffic]
) -> Iterator[Row]:
    """Rows of the time model; the means also go into `found`."""
    for batch in BATCHES:
        ms, moved = exposed_ms(traffic, case.recording, rows=batch, machine=Machine(), skip=case.skip)
        found[f"ms{batch}"] = float(ms.mean())
        yield case.row(
            f"c{ratio}-{policy}",
            "exposed_transfer_mean",
            "ms",
            float(ms.mean()),
            baseline=policy,
            batch=batch,
            bytes_moved=float(moved.mean()),
        )


def selection_rows(
    case: Case, ratios: Sequence[float], guesses: Guesses | None
) -> Iterator[tuple[str, dict[str, float], list[Row]]]:
    """What SELECTIONS cost: attention mass of the recorded queries, against that of the recorded selection.

    Every layer is asked about the recorded hidden states: that its output would change later ones is left out.
    """
    if case.scores is None:
        return
    recording, mass = case.recording, case.scores["mass"]
    for policy in SELECTIONS:
        for ratio in ratios if policy == "late" else (None,):
            captured, own, same = [], [], []
            traffic = None if ratio is None else replay_all(case, "lru", ratio, guesses)
            for stream in range(recording.streams):
                other = otherwise(policy, stream, recording, guesses)
                if other is None or other[1] is None:
                    continue
                true = recording.base[stream].astype(np.int64)
                own.append(_sum_of(mass[stream], true)[case.skip :])
                if traffic is None:
                    captured.append(_sum_of(mass[stream], other[0])[case.skip :])
                    pairs = zip(other[0][case.skip :], true[case.skip :], strict=True)
                    same.append(np.mean([np.isin(a, b).mean() for a, b in pairs]))
                else:
                    missed = traffic[stream].missed
                    lost = [mass[stream][t, missed[t]].sum() for t in range(case.skip, len(missed))]
                    captured.append(own[-1] - np.array(lost))
                    same.append(1 - traffic[stream].demand[case.skip :].mean() / recording.block_budget)
            if not own:
                continue
            loss = np.stack(own) - np.stack(captured)
            found = {
                "captured_mass": float(np.mean(captured)),
                "captured_mass_recorded": float(np.mean(own)),
                "lost_mass_p99": float(np.percentile(loss, 99)),
                "lost_mass_max": float(loss.max()),
                "same_blocks": float(np.mean(same)),
            }
            what = policy if ratio is None else f"c{ratio}-{policy}"
            yield (
                what,
                found,
                [case.row(what, m, "share", value, baseline=policy) for m, value in found.items()],
            )


def _sum_of(mass: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mass of the blocks of every step, [steps]."""
    return np.take_along_axis(mass, ids, 1).sum(1, dtype=np.float64)


def miss_rows(
    case: Case, ratios: Sequence[float], guesses: Guesses | None
) -> Iterator[tuple[float, float, Row]]:
    """Of the blocks that plain LRU misses, the share that was chosen for its heat."""
    recording = case.recording
    if guesses is None or not recording.meta["agnostic_blocks"]:
        return
    for ratio in ratios:
        traffic = replay_all(case, "lru", ratio, guesses)
        assert traffic is not None and case.scores is not None
        by_heat = total = 0
        for stream, found in enumerate(traffic):
            best = query_blocks(recording, case.scores["scores"][stream])
            for t in range(case.skip, recording.recorded_steps):
                by_heat += int((~np.isin(found.missed[t], best[t])).sum())
                total += len(found.missed[t])
        share = by_heat / total if total else 0.0
        row = case.row(f"c{ratio}-lru", "misses_chosen_by_heat", "share", share, baseline="lru")
        yield ratio, share, row


# ---- the command -------------------------------------------------------------------------------------------------


def add_parser(suites: Any, common: argparse.ArgumentParser, run: Callable[..., int]) -> None:
    """Add the `prefetch` suite."""
    parser = suites.add_parser(
        "prefetch",
        parents=[common],
        help="recorded block ids replayed under prefetch policies",
        epilog="policies: "
        + "; ".join(f"{name}: {what}" for name, what in {**POLICIES, **SELECTIONS}.items()),
    )
    parser.add_argument("recordings", nargs="+", type=Path, help="recordings, or folders of them")
    parser.add_argument(
        "--capacity", default="1.0,1.25,1.4,1.5,2.0", metavar="X,...", help="x budget: %(default)s"
    )
    parser.add_argument(
        "--policies", default=",".join([*POLICIES, *SELECTIONS]), metavar="P,...", help="default: all"
    )
    parser.add_argument(
        "--scores", type=Path, help="folder of `bench record --scores`; without it, fewer policies"
    )
    parser.add_argument("--skip", type=int, default=SKIP, help="first steps left out (default: %(default)s)")
    parser.set_defaults(run=run)


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Return the recordings among files and folders.

    Raises:
        ValueError: a folder without any.
    """
    found: list[Path] = []
    for path in paths:
        inside = [path] if not path.is_dir() else sorted(path.glob("*.npz"))
        if not inside:
            raise ValueError(f"no recordings in {path}")
        found += inside
    return found


def run_prefetch(args: argparse.Namespace, add: Callable[[list[Row]], None]) -> None:
    """Replay every recording, print its tables and hand over its rows.

    Raises:
        ValueError: unknown policies, a pool below one budget, or nothing left after the skipped steps.
    """
    ratios, policies = [float(x) for x in args.capacity.split(",")], args.policies.split(",")
    known = {**POLICIES, **SELECTIONS}
    if unknown := sorted({*policies} - {*known}):
        raise ValueError(f"unknown policies {', '.join(unknown)}; known: {', '.join(known)}")
    if min(ratios) < 1:
        raise ValueError(f"--capacity must be at least 1.0, not {min(ratios)}")
    for path in files_of(args.recordings):
        case = Case.load(path, args.scores, args.skip)
        if not 0 <= args.skip < case.recording.recorded_steps:
            raise ValueError(f"--skip {args.skip} leaves nothing of {case.recording.recorded_steps} steps")
        guesses = None if case.scores is None else Guesses.of(case.recording, case.scores)
        last, kept = 0.0, []
        for ratio, policy, found, rows in policy_rows(case, ratios, policies, guesses):
            if ratio != last:
                print(f"\n{case.name}, capacity {ratio} x budget\n{HEADER}")
                last = ratio
            print(line(policy, found), flush=True)
            kept += rows
        for name, values, rows in selection_rows(case, ratios, guesses):
            print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
            kept += rows
        for ratio, share, row in miss_rows(case, ratios, guesses):
            print(f"capacity {ratio}: {share:.1%} of the misses were chosen by heat")
            kept.append(row)
        add(kept)


HEADER = f"{'policy':<22}{'demand':>8}{'miss %':>8}{'link':>8}{'extra %':>9}{'useful %':>9}" + "".join(
    f"{f'B={b} ms':>10}" for b in BATCHES
)


def line(policy: str, found: dict[str, float]) -> str:
    """Return one line of the table: blocks per (row, layer, KV head) and step, mean exposed ms per step."""
    text = f"{policy:<22}{found['demand']:>8.3f}{100 * found['miss_rate']:>8.2f}{found['link']:>8.3f}"
    text += f"{100 * found['extra']:>9.1f}{100 * found['useful']:>9.1f}"
    return text + "".join(f"{found[f'ms{b}']:>10.3f}" for b in BATCHES)
