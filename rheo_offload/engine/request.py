"""One request: what was asked for, how far it is, what came out."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from rheo_offload.execution.sampler import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


class State(Enum):
    """Where a request is. `FINISHED` and `FAILED` are final."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A prompt and the tokens that answer it. Two requests are equal only if they are the same object."""

    id: str
    prompt_ids: Tensor
    """int64 [prompt tokens], on the host."""
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    """The model's end tokens; they count unless `params.ignore_eos`."""
    on_token: Callable[["Request", int], None] | None = None
    """Called with every new token, after it was added."""

    # set by the scheduler
    state: State = State.WAITING
    row: int | None = None
    """Row of the batch while prefilling or running."""
    computed_tokens: int = 0
    """Prompt tokens whose keys and values exist."""
    finish_reason: FinishReason | None = None
    error: BaseException | None = None

    # set by `add_token`
    output_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    """`time.perf_counter` of every new token."""
    submitted_at: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        """Check the prompt.

        Raises:
            ValueError: it is not a 1-D int64 tensor on the host.
        """
        ids = self.prompt_ids
        if ids.dim() != 1 or ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise ValueError(
                f"prompt_ids must be int64 [tokens] on the CPU, not {ids.dtype} {list(ids.shape)} on {ids.device}"
            )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.prompt_ids.numel()

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that are prefilled: all but the last, which goes through the decode path."""
        return max(0, self.prompt_tokens - 1)

    @property
    def total_tokens(self) -> int:
        """Prompt and new tokens at most."""
        return self.prompt_tokens + self.params.max_new_tokens

    @property
    def is_done(self) -> bool:
        """Whether the state is final."""
        return self.state in (State.FINISHED, State.FAILED)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end this request."""
        return frozenset(self.params.stop_token_ids) | frozenset(
            () if self.params.ignore_eos else self.eos_token_ids
        )

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds from submission to the first token; None before it."""
        return (self.token_times[0] - self.submitted_at) * 1e3 if self.token_times else None

    @property
    def itl_ms(self) -> float | None:
        """Mean milliseconds between tokens; None before the second."""
        steps = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) * 1e3 / steps if steps > 0 else None

    def add_token(self, token: int, now: float | None = None) -> FinishReason | None:
        """Add a new token (a stop token included) and say whether it ends the request, and why.

        Args:
            token: its id.
            now: its time by `time.perf_counter`; the present when None.
        """
        self.output_ids.append(token)
        self.token_times.append(time.perf_counter() if now is None else now)
        if self.on_token is not None:
            self.on_token(self, token)
        if token in self.stop_ids:
            return "stop"
        return "length" if len(self.output_ids) >= self.params.max_new_tokens else None
