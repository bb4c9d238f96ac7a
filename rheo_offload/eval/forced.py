"""Teacher forcing: a real text goes through the decode path token by token, whatever the model would have said."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rheo_offload.eval.prompts import Source
from rheo_offload.eval.task import Case, Settings

__all__ = ["Forced", "ForcedJob"]


class Forced:
    """What both tasks share: windows of the text, one per context and sample."""

    name: str
    needs_reference: bool
    prefills_question = False

    def cases(self, settings: Settings) -> list[Case]:
        """Return one case per context and sample; sample n begins n scored stretches further on in the text."""
        return [
            Case(
                task=self.name,
                params={"context": n, "scored": settings.scored_tokens, "sample": sample},
                new_tokens=settings.scored_tokens,
            )
            for n in settings.contexts
            for sample in range(settings.samples)
        ]

    def script(self, case: Case, source: Source) -> Tensor:
        """Return the case's window of the text, BOS in front: [context + scored] int64."""
        scored = int(case.params["scored"])
        skip = int(case.params["sample"]) * scored
        text = source.prose(case.context + scored - len(source.bos), skip=skip)
        return torch.tensor([*source.bos, *text])


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedJob:
    """A window [L] whose first `context` tokens are read, all but the last of them by the dense prefill."""

    script: Tensor
    context: int

    @property
    def tokens(self) -> int:
        """Tokens of the window."""
        return len(self.script)

    @property
    def start(self) -> int:
        """Tokens that the prefill reads; the next one is the first to go through the decode path."""
        return self.context - 1
