"""The suites of `python -m bench targets`: each measures one row of the table of targets."""

from collections.abc import Callable

from bench.lab import Lab
from bench.suites import breakdown, choosing, link, long_run, memory, misses, peers, resident

__all__ = ["SUITES"]

SUITES: dict[str, Callable[[Lab], None]] = {
    "resident": resident.run,
    "misses": misses.run,
    "breakdown": breakdown.run,
    "choosing": choosing.run,
    "memory": memory.run,
    "peers": peers.run,
    "link": link.run,
    "long-run": long_run.run,
}
