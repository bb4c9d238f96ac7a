"""Recall contexts as texts of a replay: questions and their right answers are the steps, for the model `native`."""

from itertools import cycle

import torch
from torch import Tensor

from rheo_offload.eval.recall import NUM_NAMES, SLOT, SPAN, Layout, Task, make_batch, question_tokens

__all__ = ["RECALL_TEXTS", "recall_ids"]

_PAIR: tuple[Task, int] = ("retrieval", 1)
_CHAIN: tuple[Task, int] = ("tracking", 4)
_SPAN: tuple[Task, int] = ("copying", SPAN)
RECALL_TEXTS: dict[str, tuple[tuple[tuple[Task, int], ...], bool]] = {
    "recall-retrieval": ((_PAIR,), False),
    "recall-tracking": ((_CHAIN,), False),
    "recall-copying": ((_SPAN,), False),
    "recall-crowded": ((_PAIR, _CHAIN, _SPAN), True),
}
"""Name -> the questions that are asked in turn, and whether their records crowd in a few regions of the context."""
SEED = 9_000_000  # no step of training or test of the model saw its contexts


def recall_ids(name: str, prompt_tokens: int, steps: int) -> Tensor:
    """Return a context of `prompt_tokens` and the first `steps` tokens of what is asked about it, int64 [S].

    Raises:
        ValueError: so many steps ask for more names than there are.
    """
    questions, crowded = RECALL_TEXTS[name]
    asked: list[tuple[Task, int]] = []
    for question in cycle(questions):
        if sum(question_tokens(*item) for item in asked) >= steps:
            break
        asked.append(question)
    if sum(names for _, names in asked) > NUM_NAMES:
        raise ValueError(
            f"{name}: {steps} steps ask for more than the {NUM_NAMES} names there are; take fewer"
        )
    records = sum(names if task == "tracking" else 1 for task, names in asked)
    layout = Layout(
        num_tokens=prompt_tokens + sum(question_tokens(*item) for item in asked),
        context_tokens=prompt_tokens,
        lengths=tuple(asked),
        hot_regions=-(-records // SLOT) if crowded else 0,
    )
    seed = SEED + list(RECALL_TEXTS).index(name)
    return make_batch(layout, 1, torch.Generator().manual_seed(seed))[0, : prompt_tokens + steps]
