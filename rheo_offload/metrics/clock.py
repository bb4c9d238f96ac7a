"""When the tokens of one run were ready."""

import time
from collections import deque

GAPS_KEPT = 1 << 16
"""Steps whose distances are kept, the last ones: an engine may run for days."""


class RunClock:
    """The host's clock over the last run of a cache (somebody reads every step's tokens, so the host knows)."""

    def __init__(self) -> None:
        self.started = 0.0
        self.prompt_tokens = 0
        self.rows = 0
        self.start(0, 0)

    def start(self, prompt_tokens: int, rows: int) -> None:
        """Begin a run of `rows` sequences."""
        self.started = time.perf_counter()
        self.first: float | None = None
        self.last = 0.0
        self.ticks = 0
        self.gaps: deque[float] = deque(maxlen=GAPS_KEPT)
        """Seconds between the tokens of one step and those of the next."""
        self.new_tokens: int | None = None
        self.prompt_tokens, self.rows = prompt_tokens, rows

    def tick(self) -> None:
        """Note that a step's tokens are ready."""
        now = time.perf_counter()
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.ticks += 1

    def finish(self, new_tokens: int) -> None:
        """Note how many tokens were generated over all rows, padding after an end token left out."""
        self.new_tokens = new_tokens

    @property
    def generated(self) -> int:
        """New tokens over all rows; for a run that was interrupted, one per row and step."""
        return self.ticks * self.rows if self.new_tokens is None else self.new_tokens
