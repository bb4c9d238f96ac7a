"""When the tokens of one `generate` call were ready."""

import time


class RunClock:
    """The host's clock over the last run of a cache (transformers reads every step's tokens, so the host knows)."""

    def __init__(self) -> None:
        self.started = 0.0
        self.times: list[float] = []
        self.prompt_tokens = 0
        self.rows = 0
        self.new_tokens: int | None = None

    def start(self, prompt_tokens: int, rows: int) -> None:
        """Begin a run of `rows` sequences."""
        self.started, self.times, self.new_tokens = time.perf_counter(), [], None
        self.prompt_tokens, self.rows = prompt_tokens, rows

    def tick(self) -> None:
        """Note that a step's tokens are ready."""
        self.times.append(time.perf_counter())

    def finish(self, new_tokens: int) -> None:
        """Note how many tokens were generated over all rows, padding after an end token left out."""
        self.new_tokens = new_tokens

    @property
    def generated(self) -> int:
        """New tokens over all rows; for a run that was interrupted, one per row and step."""
        return len(self.times) * self.rows if self.new_tokens is None else self.new_tokens
