"""The next token of every row: its rules in device buffers, so that a captured step serves any mix of requests."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from rheo_offload.ops import of_kernels
from rheo_offload.transfer.upload import Uploader

Upload = Callable[[list[float], torch.dtype, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends."""

    temperature: float = 0.0
    """Divides the logits; 0: the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Then from the smallest set of most likely tokens with this probability, in (0, 1]; 1: from all."""
    seed: int | None = None
    """The same seed, position and logits give the same token. None: drawn from torch's default generator."""
    max_new_tokens: int = 128
    """Tokens to generate at most."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request, beyond the model's own."""
    ignore_eos: bool = False
    """Go on after the model's end tokens."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: a value out of range, or of the wrong type; the message names it.
        """
        numbers = _is_number(self.temperature) and _is_number(self.top_p)
        if not numbers or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p!r}")
        if not _is_int(self.top_k, 0, 2**31):
            raise ValueError(
                f"top_k must be a whole number of at least 0 (0: all tokens), not {self.top_k!r}"
            )
        if self.seed is not None and not _is_int(self.seed, -(2**63), 2**63):
            raise ValueError(f"seed must be None or a whole number of 64 bits, not {self.seed!r}")
        if not _is_int(self.max_new_tokens, 1, 2**63):
            raise ValueError(
                f"max_new_tokens must be a whole number of at least 1, not {self.max_new_tokens!r}"
            )
        stops = self.stop_token_ids
        if not isinstance(stops, tuple) or not all(_is_int(i, 0, 2**63) for i in stops):
            raise ValueError(f"stop_token_ids must be a tuple of token ids, not {stops!r}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


class Sampler:
    """Chooses tokens for the first rows of a batch. `tokens` and `bad` are [rows] on the device.

    `bad` stays 1 for a row whose logits were unusable once (NaN, +inf or nothing finite), until `set_row`.
    """

    def __init__(
        self,
        rows: int,
        vocab_size: int,
        device: torch.device,
        ops: SimpleNamespace,
        *,
        upload: Upload | None = None,
    ) -> None:
        """Allocate the buffers of `rows` rows; every row starts greedy.

        Args:
            rows: of the batch.
            vocab_size: logits of a row.
            device: of the logits.
            ops: `kernels_for(device)`.
            upload: as `Uploader.upload`, which is the default.

        Raises:
            ValueError: no rows, or a vocabulary that the kernels do not take.
        """
        most, words = largest_vocabulary(), of_kernels("reference.sample_greedy", "SCRATCH_WORDS")
        if rows < 1 or not 1 <= vocab_size <= most:
            raise ValueError(
                f"a sampler has at least one row and 1 to {most} logits a row, not {rows} of {vocab_size}"
            )
        self.rows, self.vocab_size, self._ops = rows, vocab_size, ops
        self._upload: Upload = upload or Uploader(device, slots=16, bytes=64).upload
        self._params = [SamplingParams()] * rows
        self.temperature = torch.zeros(rows, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(rows, dtype=torch.int32, device=device)
        self.top_p = torch.ones(rows, dtype=torch.float32, device=device)
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.bad = torch.zeros(rows, dtype=torch.int32, device=device)
        self._scratch = torch.zeros(rows, words, dtype=torch.int64, device=device)

    def set_row(self, row: int, params: SamplingParams) -> None:
        """Give a row to a request. Queued on the current stream, no wait; a missing seed is drawn here."""
        if params.seed is None:
            params = replace(params, seed=int(torch.randint(-(2**63), 2**63 - 1, ())))
        self._params[row] = params
        for buffer, value in (
            (self.temperature, params.temperature),
            (self.top_k, params.top_k),
            (self.top_p, params.top_p),
            (self.seed, params.seed),
            (self.bad, 0),
        ):
            self._upload([value], buffer.dtype, buffer[row : row + 1])  # type: ignore[list-item]

    def clear_row(self, row: int) -> None:
        """Forget the request of a row, so that it no longer asks for sampling. Touches no device memory."""
        self._params[row] = SamplingParams()

    def swap_rows(self, i: int, j: int) -> None:
        """Exchange all that belongs to two rows. Queued on the current stream, no wait."""
        self._params[i], self._params[j] = self._params[j], self._params[i]
        for buffer in (self.temperature, self.top_k, self.top_p, self.seed, self.tokens, self.bad):
            first = buffer[i].clone()
            buffer[i].copy_(buffer[j])
            buffer[j].copy_(first)

    def params(self, row: int) -> SamplingParams:
        """The parameters of a row, its seed filled in."""
        return self._params[row]

    def all_greedy(self, rows: int) -> bool:
        """Whether none of the first `rows` rows draws: then the cheaper greedy step gives the same tokens."""
        return all(params.greedy for params in self._params[:rows])

    def __call__(self, logits: Tensor, positions: Tensor, *, greedy: bool) -> Tensor:
        """Choose the next token of the first b rows. Can be captured; writes `tokens` and `bad`.

        Args:
            logits: [b, V], fp32, bf16 or fp16, last dim contiguous.
            positions: int64 [b], the position that each new token will have.
            greedy: take the most likely token whatever the rows ask for (see `all_greedy`).

        Returns:
            int64 [b], a view of `tokens`; 0 where `bad`.
        """
        b = logits.shape[0]
        tokens, bad, scratch = self.tokens[:b], self.bad[:b], self._scratch[:b]
        if greedy:
            self._ops.sample_greedy(logits, scratch, tokens, bad)
        else:
            rules = (self.temperature[:b], self.top_k[:b], self.top_p[:b], self.seed[:b])
            self._ops.sample(logits, positions, *rules, scratch, tokens, bad)
        return tokens


def largest_vocabulary() -> int:
    """Return how many logits a row can have at most."""
    return int(of_kernels("reference.sample_greedy", "MAX_VOCABULARY"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: object, low: int, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < end
