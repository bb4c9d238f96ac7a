"""Everything that is said of a trace: hit rates per policy and capacity, and what a step would cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rheo_offload.errors import TraceError
from rheo_offload.trace.file import Trace
from rheo_offload.trace.forecast import Machine
from rheo_offload.trace.replay import (
    PREFETCH,
    Forecast,
    PrefetchName,
    Replay,
    Selected,
    forecast,
    replay,
    replay_all,
)
from rheo_offload.trace.simulate import POLICIES, PolicyName

__all__ = ["Analysis", "analyse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """A trace and its replays."""

    trace: Trace
    selected: Selected
    run: Replay
    """`lru` at the capacity of the run."""
    disagreement: int
    """(layer, row, KV head, step) in which `run` misses another number of blocks than the run did."""
    replays: list[Replay]
    forecasts: list[tuple[Replay, Forecast]]
    """Of `run` and of `lru` at every other capacity, per batch."""
    machine: Machine
    skip: int

    def rates(self, found: Replay) -> tuple[float, float]:
        """Return (hit rate, hit rate without forced blocks) of a replay."""
        return found.hit_rate(self.selected, self.skip), found.hit_rate_unforced(self.selected, self.skip)

    def record(self) -> dict[str, Any]:
        """Return all of it, JSON-ready."""
        return {
            "trace": self.trace.meta,
            "steps": self.trace.steps,
            "skipped_steps": self.skip,
            "disagreement": self.disagreement,
            "run": self._replay(self.run),
            "replays": [self._replay(found) for found in self.replays],
            "machine": asdict(self.machine),
            "forecasts": [
                {
                    "policy": found.policy,
                    "ratio": found.ratio,
                    "capacity": found.capacity,
                    **asdict(cost),
                    "tokens_per_s": cost.tokens_per_s,
                }
                for found, cost in self.forecasts
            ],
        }

    def _replay(self, found: Replay) -> dict[str, Any]:
        rate, unforced = self.rates(found)
        early = int(sum(int(part.sum()) for part in found.early.values()))
        return {
            "policy": found.policy,
            "ratio": found.ratio,
            "capacity": found.capacity,
            "hit_rate": _finite(rate),
            "hit_rate_unforced": _finite(unforced),
            "demand_blocks_per_step": _finite(found.demand_blocks(self.selected, self.skip)),
            "link_blocks_per_step": _finite(found.link_blocks(self.selected, self.skip)),
            "useful_prefetch": found.useful / early if early else None,
        }

    # ---- tables, as rows of text ------------------------------------------------------------------------------------

    def hit_table(self) -> list[list[str]]:
        """Return a header and a row per policy: hit rate (without forced blocks) per capacity."""
        ratios = list(dict.fromkeys(found.ratio for found in self.replays))
        rows = [["policy", *(f"{ratio:g} x" for ratio in ratios)]]
        for policy in dict.fromkeys(found.policy for found in self.replays):
            cells = [self._cell(found) for found in self.replays if found.policy == policy]
            rows.append([policy, *cells])
        return rows

    def _cell(self, found: Replay) -> str:
        rate, unforced = self.rates(found)
        return f"{rate:.2%} ({unforced:.2%})"

    def link_table(self) -> list[list[str]]:
        """Return a header and a row per policy: blocks over the link per (layer, row, KV head) and step."""
        ratios = list(dict.fromkeys(found.ratio for found in self.replays))
        rows = [["policy", *(f"{ratio:g} x" for ratio in ratios)]]
        for policy in dict.fromkeys(found.policy for found in self.replays):
            cells = [
                f"{found.link_blocks(self.selected, self.skip):.3f}"
                for found in self.replays
                if found.policy == policy
            ]
            rows.append([policy, *cells])
        return rows

    def forecast_table(self) -> list[list[str]]:
        """Return a header and a row per capacity and batch."""
        rows = [["capacity", "batch", "MB over the link", "exposed ms", "step ms", "tok/s"]]
        for found, cost in self.forecasts:
            rows.append(
                [
                    f"{found.ratio:.4g} x" + (" (the run's)" if found is self.run else ""),
                    str(cost.rows),
                    f"{cost.link_bytes / 1e6:.2f}",
                    f"{cost.exposed_ms:.3f}",
                    f"{cost.step_ms:.3f}",
                    f"{cost.tokens_per_s:.1f}",
                ]
            )
        return rows

    def check_line(self) -> str:
        """Return whether the replay of the run is the run."""
        if not self.disagreement:
            return "replayed at its own capacity, the run misses in every step as many blocks as it did"
        share = self.disagreement / self.run.demand.size
        return (
            f"replayed at its own capacity, {share:.2%} of the (layer, row, KV head, step) miss another number of "
            "blocks than the run did: something else than decoding changed what was resident"
        )

    def assumptions(self) -> str:
        """Return what the forecast takes for granted."""
        m = self.machine
        return (
            f"{m.num_layers} layers x {m.num_kv_heads} KV heads, blocks of {m.block_bytes / 1024:g} KiB, link "
            f"{m.link_bytes_per_s / 1e9:g} GB/s, attention {m.attention_bytes_per_s / 1e9:g} GB/s, "
            f"{m.rest_of_layer_s * 1e6:g} us per layer besides"
        )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def analyse(
    trace: Trace,
    *,
    ratios: Sequence[float],
    machine: Machine,
    batches: Sequence[int] = (1, 16, 64),
    policies: Sequence[PolicyName | PrefetchName] = (*POLICIES, *PREFETCH),
    skip: int = 0,
) -> Analysis:
    """Replay a trace and forecast.

    Args:
        trace: the run.
        ratios: capacities over budget.
        machine: what the forecast is for.
        batches: rows of the forecast.
        policies: what is replayed.
        skip: first steps left out of every figure (the pool right after a prompt is not the pool later).

    Raises:
        TraceError: an impossible capacity, an unknown policy, or nothing left after the skipped steps.
    """
    if not 0 <= skip < trace.steps:
        raise TraceError(f"skipping {skip} steps leaves nothing of {trace.steps}")
    run = replay(trace, "lru")
    replays = replay_all(trace, ratios, policies)
    plain = [found for found in replays if found.policy == "lru"] or replay_all(trace, ratios, ["lru"])
    others = [found for found in plain if found.capacity != run.capacity]
    costs = [
        (found, forecast(trace, found, rows=rows, machine=machine, skip=skip))
        for found in sorted([run, *others], key=lambda found: found.capacity)
        for rows in batches
    ]
    return Analysis(
        trace=trace,
        selected=Selected.of(trace),
        run=run,
        disagreement=int((run.demand != trace.misses).sum()),
        replays=replays,
        forecasts=costs,
        machine=machine,
        skip=skip,
    )
