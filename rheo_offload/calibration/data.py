"""Text files as windows of tokens; what is too little is refused before any weight is read or moved."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rheo_offload.errors import CalibrationError

HELD_OUT = 2  # windows: one to stop early on, one for the score


@dataclass(frozen=True, slots=True)
class Windows:
    """Disjoint windows [tokens] int64 of one text, all of a length."""

    fit: list[Tensor]
    stop: Tensor
    score: Tensor

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return (len(self.fit) + HELD_OUT) * len(self.score)


def read_texts(files: Sequence[str]) -> str:
    """Return the texts of files, one after another.

    Raises:
        CalibrationError: a file cannot be read, or is no UTF-8 text.
    """
    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"cannot read {file}: {error}") from error
    return "\n\n".join(texts)


def cut(text: str, tokenizer: Any, *, context: int, most: int) -> Windows:
    """Tokenise and cut a text into windows; the last two are held out.

    Args:
        text: to fit on.
        tokenizer: of the model; its start token opens every window, if it has one.
        context: tokens a window.
        most: windows to use at most, from the beginning of the text.

    Raises:
        CalibrationError: there is less text than three windows.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    length = context - len(start)
    count = min(len(ids) // length, most)
    if count < HELD_OUT + 1:
        raise CalibrationError(
            f"the text has {len(ids)} tokens; {HELD_OUT + 1} windows of --context {context} need "
            f"{(HELD_OUT + 1) * length}: give more text or a shorter context"
        )
    opening = torch.tensor(start, dtype=torch.long)
    windows = [torch.cat((opening, part)) for part in ids[: count * length].split(length)]
    return Windows(windows[:-HELD_OUT], windows[-2], windows[-1])
