"""Synthetic recall: records hidden in filler, and questions about them, made in whole batches on any device.

A context is a row of slots of eight tokens. Most hold filler words; some hold one record at a random offset:

    [ n12 v3 ]              a pair: the value of a name
    [ n7 n40 ] [ n40 n12 ]  two links of a chain, in any order and place; the last one is a pair
    [ n5 n9 n31 n2 ]        a span to copy: its mark, then names

Questions follow the context, and their answers are what a model is asked for:

    ? n12 v3 ]              retrieval
    ? n7 n40 n12 v3 ]       variable tracking: the chain down to its value
    ? n5 n9 n31 n2 ]        copying

Names are drawn anew for every sequence, none serves twice, and filler words are uniform, so that nothing but the
record itself tells an answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["TASKS", "VOCABULARY", "Layout", "Question", "ask", "draw_layout", "draw_sequence", "make_batch"]

Task = Literal["retrieval", "tracking", "copying"]
TASKS: tuple[Task, ...] = ("retrieval", "tracking", "copying")
SPECIALS = ("<pad>", "<bos>", "[", "]", "?")
PAD, BOS, OPEN, CLOSE, ASK = range(len(SPECIALS))
NUM_VALUES, NUM_NAMES, NUM_FILLER = 64, 256, 128
VALUE0 = len(SPECIALS)
NAME0 = VALUE0 + NUM_VALUES
FILLER0 = NAME0 + NUM_NAMES
VOCABULARY = [
    *SPECIALS,
    *(f"v{i}" for i in range(NUM_VALUES)),
    *(f"n{i}" for i in range(NUM_NAMES)),
    *(f"w{i}" for i in range(NUM_FILLER)),
]
SLOT = 8
SPAN = SLOT - 2
"""Longest copied span, its mark included: with the brackets it fills a slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a layout.

    Attributes:
        task: what is asked.
        start: position of the last token that is given (the name after `?`).
        end: position of the last token of the answer, `]`; the tokens `start + 1 .. end` are to be predicted.
    """

    task: Task
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What all sequences of a batch have in common; names, values, filler and places of records differ.

    Attributes:
        num_tokens: length of a sequence.
        context_tokens: tokens ahead of the first `?`.
        lengths: (task, names in the record chain: 1 for a pair, links for a chain, the mark and what follows for
            a span) of every question, in the order asked.
        hot_regions: regions of eight slots that records may stand in, or 0 for all.
    """

    num_tokens: int
    context_tokens: int
    lengths: tuple[tuple[Task, int], ...]
    hot_regions: int

    @property
    def questions(self) -> list[Question]:
        """Return where the questions and answers stand."""
        position, found = self.context_tokens, []
        for task, names in self.lengths:
            size = question_tokens(task, names)
            found.append(Question(task=task, start=position + 1, end=position + size - 1))
            position += size
        return found


def question_tokens(task: Task, names: int) -> int:
    """Return the tokens of a question with its answer: `?`, the names, a value unless it is a span, `]`."""
    return names + (2 if task == "copying" else 3)


def draw_layout(num_tokens: int, max_question_tokens: int, generator: torch.Generator) -> Layout:
    """Draw how many questions of every kind a batch asks.

    Args:
        num_tokens: length of a sequence, at least 64.
        max_question_tokens: room for questions at the end; a draw uses 30 to 100 % of it.
        generator: on the CPU.

    Raises:
        ValueError: there is no room for a question and its records.
    """

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    def integer(low: int, high: int) -> int:  # both included
        return int(torch.randint(low, high + 1, (), generator=generator))

    room = int(max_question_tokens * (0.3 + 0.7 * uniform()))
    links, span = integer(2, 4), integer(3, SPAN)
    sizes: dict[Task, int] = {"retrieval": 1, "tracking": links, "copying": span}
    asked = drawn = records = 0
    items: list[tuple[Task, int]] = []
    while True:
        task = TASKS[(0, 0, 1, 2)[integer(0, 3)]]
        names = sizes[task]
        asked += question_tokens(task, names)
        drawn += names
        records += names if task == "tracking" else 1
        slots = (num_tokens - 1 - asked) // SLOT
        if drawn > NUM_NAMES or records > slots or (items and asked > room):
            break
        items.append((task, names))
    if not items:
        raise ValueError(f"{num_tokens} tokens have no room for a question and its records")
    asked = sum(question_tokens(task, names) for task, names in items)
    records = sum(names if task == "tracking" else 1 for task, names in items)
    slots = (num_tokens - 1 - asked) // SLOT
    least = -(-records // SLOT)
    regions = slots // SLOT
    hot = integer(least, max(least, regions // 2)) if uniform() < 0.5 and least < regions else 0
    return Layout(
        num_tokens=num_tokens, context_tokens=num_tokens - asked, lengths=tuple(items), hot_regions=hot
    )


def make_batch(layout: Layout, batch: int, generator: torch.Generator) -> Tensor:
    """Make sequences of one layout.

    Args:
        layout: what they have in common.
        batch: number of sequences, B.
        generator: its device is where the batch is made.

    Returns:
        int64 [B, num_tokens].
    """
    device = generator.device

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (batch, *shape), generator=generator, device=device)

    ids = integers(FILLER0, FILLER0 + NUM_FILLER, layout.num_tokens)
    ids[:, 0] = BOS
    names = NAME0 + torch.rand(batch, NUM_NAMES, generator=generator, device=device).argsort(1)
    records, asked = _spell(layout.lengths, names, integers(VALUE0, VALUE0 + NUM_VALUES, len(layout.lengths)))
    ids[:, layout.context_tokens :] = asked
    slots = (layout.context_tokens - 1) // SLOT
    first = layout.context_tokens - slots * SLOT
    place = _draw_slots(layout, slots, batch, len(records), generator)
    for j, record in enumerate(records):
        size = record.shape[1]
        offset = integers(0, SLOT - size + 1)
        where = (first + place[:, j] * SLOT + offset)[:, None] + torch.arange(size, device=device)
        ids.scatter_(1, where, record)
    return ids


def draw_sequence(num_tokens: int, max_question_tokens: int, seed: int) -> tuple[Layout, Tensor]:
    """Draw a layout and one sequence of it, ids [1, num_tokens], on the CPU; arguments and errors as `draw_layout`."""
    layout = draw_layout(num_tokens, max_question_tokens, torch.Generator().manual_seed(seed))
    return layout, make_batch(layout, 1, torch.Generator().manual_seed(seed))


def _spell(lengths: Sequence[tuple[Task, int]], names: Tensor, values: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the records [B, tokens] and all questions with their answers [B, asked tokens]."""

    def mark(token: int) -> Tensor:
        return torch.full_like(names[:, :1], token)

    records, asked, used = [], [], 0
    for i, (task, count) in enumerate(lengths):
        chain = names[:, used : used + count]
        used += count
        if task != "copying":
            chain = torch.cat((chain, values[:, i : i + 1]), 1)
        asked += [mark(ASK), chain, mark(CLOSE)]
        links = [chain] if task == "copying" else [chain[:, j : j + 2] for j in range(count)]
        records += [torch.cat((mark(OPEN), link, mark(CLOSE)), 1) for link in links]
    return records, torch.cat(asked, 1)


def _draw_slots(layout: Layout, slots: int, batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Return [B, count] distinct slots, in the hot regions first where a layout has them."""
    device = generator.device
    order = torch.rand(batch, slots, generator=generator, device=device)
    regions = slots // SLOT
    if layout.hot_regions:
        rank = torch.rand(batch, regions, generator=generator, device=device).argsort(1).argsort(1)
        cold = (rank >= layout.hot_regions).repeat_interleave(SLOT, 1)
        order[:, : regions * SLOT] += cold
        order[:, regions * SLOT :] += 1
    return order.argsort(1)[:, :count]


def ask(
    model: Any, ids: Tensor, layout: Layout, *, cache: Any = None
) -> Iterator[tuple[Question, list[int]]]:
    """Ask a model all questions of one sequence, turn by turn on one cache; yields what it answers.

    The context is read once, densely; in an offloaded model, questions and answers go through the decode path. An
    answer stays in the conversation as it was given, right or wrong.

    Args:
        model: offloaded, or the stock model where `cache` is one of transformers.
        ids: [1, num_tokens] of `make_batch`.
        layout: of that batch.
        cache: an empty one; None: a new one of the offloaded model.
    """
    if cache is None:
        cache = model.rheo.new_cache(max_length=layout.num_tokens + SLOT)
    decoded = {"decode_tail_tokens": 3} if hasattr(model, "rheo") else {}
    turn = ids[:, : layout.context_tokens].to(model.device)
    for question in layout.questions:
        prompt = torch.cat((turn, ids[:, question.start - 1 : question.start + 1].to(model.device)), 1)
        turn = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=question.end - question.start,
            do_sample=False,
            **decoded,
        )
        yield question, turn[0, prompt.shape[1] :].tolist()
