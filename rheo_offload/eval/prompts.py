"""Prompts of an exact length: facts buried in a long text, and a question at the end."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rheo_offload.errors import RheoError

__all__ = ["Prompt", "Source", "contains", "rng_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a model is given.

    Attributes:
        ids: [1, num_tokens] int64.
        question_tokens: the last tokens of `ids`, which must be decoded one by one.
    """

    ids: Tensor
    question_tokens: int


class Source:
    """A tokenizer, and the text that prompts are filled with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[str]) -> None:
        self.tokenizer, self.paragraphs = tokenizer, paragraphs

    def tokens(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @property
    def bos(self) -> list[int]:
        """What a prompt begins with."""
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    @cached_property
    def paragraph_tokens(self) -> list[list[int]]:
        """Token ids of every paragraph, blank line included."""
        return [self.tokens(f"{paragraph}\n\n") for paragraph in self.paragraphs]

    @cached_property
    def words(self) -> list[str]:
        """The plain words of five to nine letters in the text, sorted."""
        return sorted(set(re.findall(r"(?<![\w.])[a-z]{5,9}(?![\w.(])", " ".join(self.paragraphs))))

    def prose(self, num_tokens: int, *, skip: int = 0) -> list[int]:
        """Return tokens `skip .. skip + num_tokens` of the text.

        Raises:
            RheoError: the text is shorter.
        """
        text = [token for paragraph in self.paragraph_tokens for token in paragraph]
        if len(text) < skip + num_tokens:
            raise RheoError(
                f"the text has {len(text)} tokens, too few for {skip + num_tokens}; give a longer one with --text"
            )
        return text[skip : skip + num_tokens]

    def buried(
        self, num_tokens: int, facts: Iterable[tuple[float, str]], question: str, *, ending: str = ""
    ) -> Prompt:
        """Plant facts between the paragraphs of the text and end with a question.

        Args:
            num_tokens: length of the prompt, BOS and question included.
            facts: (depth, text); depth 0 = at the beginning, 1 = before the question.
            question: the last tokens.
            ending: what stands between the text and the question, a worked example for instance.

        Raises:
            RheoError: the text is too short, or num_tokens leaves no room for any.
        """
        planted = [(depth, self.tokens(f"{text}\n\n")) for depth, text in sorted(facts)]
        end = self.tokens(ending)
        room = num_tokens - sum(len(ids) for _, ids in planted) - len(end)
        room -= len(self.bos) + len(self.tokens("\n\n")) + len(self.tokens(question))
        if room < 1:
            raise RheoError(f"a prompt of {num_tokens} tokens has no room for any text")
        text = self.prose(room)
        seams = [0]
        for paragraph in self.paragraph_tokens:
            if seams[-1] + len(paragraph) > room:
                break
            seams.append(seams[-1] + len(paragraph))
        body: list[int] = []
        done = 0
        for depth, ids in planted:
            seam = max(s for s in seams if s <= max(depth * room, 0))
            body += [*text[done:seam], *ids]
            done = seam
        return self.ended([*body, *text[done:], *end], question)

    def filled(self, num_tokens: int, lines: Iterable[str], ending: str, question: str) -> Prompt:
        """Fill the prompt with lines until no other fits; then `ending` and the question follow.

        Raises:
            RheoError: not even one line fits.
        """
        end = self.tokens(ending)
        room = num_tokens - len(self.bos) - len(end) - len(self.tokens("\n\n")) - len(self.tokens(question))
        body: list[int] = []
        for line in lines:
            ids = self.tokens(line)
            if len(body) + len(ids) > room:
                break
            body += ids
        if not body:
            raise RheoError(f"a prompt of {num_tokens} tokens has no room for a single line")
        return self.ended([*body, *end], question)

    def ended(self, body: Sequence[int], question: str) -> Prompt:
        """Put BOS before the body and the question, after a blank line, behind it."""
        asked = self.tokens(question)
        ids = [*self.bos, *body, *self.tokens("\n\n"), *asked]
        return Prompt(ids=torch.tensor([ids]), question_tokens=len(asked))


def rng_of(*key: object) -> random.Random:
    """Return the random numbers of a case: the same for the same key, on every machine."""
    return random.Random(" ".join(map(str, key)))


def contains(text: str, word: str) -> bool:
    """Say whether a text has `word` as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
