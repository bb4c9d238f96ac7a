"""The needle test: codes planted in a long real text, and a prompt that ends where the model must repeat one of them.

A base model does not answer questions about a long text, but it continues a sentence it has read. The question must
go through the decode path: a dense prefill would carry the answer past the selection. With several keys the text names
the codes of other vaults, too (passkey retrieval, arXiv:2305.16300; multi-key as in RULER, arXiv:2404.06654).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rheo_offload.eval.prompts import Prompt, Source, rng_of
from rheo_offload.eval.task import Case, Job, Question, Settings, mean_score
from rheo_offload.eval.texts import prose_paragraphs

__all__ = ["Needle", "NeedlePrompt", "needle_prompt"]

FACT = "The access code of vault {vault} is"
VAULT, CODE = "Zephyr-9", "84894"
NAMES = ("Zephyr", "Basalt", "Cobalt", "Heron", "Juniper", "Kestrel", "Marlin", "Onyx", "Quartz", "Saffron")
NEW_TOKENS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedlePrompt:
    """A prompt and what a correct continuation begins with.

    Attributes:
        ids: [1, num_tokens] int64.
        answer: the planted code.
        question_tokens: the last tokens of `ids`, which must be decoded one by one.
    """

    ids: Tensor
    answer: str
    question_tokens: int

    def found(self, continuation: str) -> bool:
        """Say whether the text the model went on with begins with the code."""
        return continuation.strip().startswith(self.answer)


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    depth: float,
    *,
    vault: str = VAULT,
    code: str = CODE,
    others: Mapping[str, tuple[float, str]] | None = None,
    source: Source | None = None,
) -> NeedlePrompt:
    """Plant a code between two paragraphs of a long text and end with the question for it.

    Args:
        tokenizer: of the model under test.
        num_tokens: length of the prompt, BOS and question included.
        depth: where the fact stands, 0 = at the beginning, 1 = before the question.
        vault: a name that occurs nowhere else in the text.
        code: what must be found.
        others: other vaults -> (depth, code), planted too.
        source: the text; the language reference of Python when None.

    Raises:
        RheoError: the text is shorter than num_tokens, or num_tokens leaves no room for the text.
        ValueError: depth is outside [0, 1].
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], not {depth}")
    source = source or Source(tokenizer, prose_paragraphs())
    facts = [(depth, f"{FACT.format(vault=vault)} {code}.")]
    facts += [(where, f"{FACT.format(vault=v)} {c}.") for v, (where, c) in (others or {}).items()]
    prompt = source.buried(num_tokens, facts, FACT.format(vault=vault))
    return NeedlePrompt(ids=prompt.ids, answer=code, question_tokens=prompt.question_tokens)


class Needle:
    """Find the code of one vault among those of several, at every depth and length."""

    name = "needle"
    needs_reference = False
    prefills_question = True

    def cases(self, settings: Settings) -> list[Case]:
        """Return one case per context, depth, number of keys and sample."""
        return [
            Case(
                task=self.name,
                params={"context": n, "depth": depth, "keys": keys, "sample": sample},
                new_tokens=NEW_TOKENS,
            )
            for n in settings.contexts
            for keys in settings.keys
            for depth in settings.depths
            for sample in range(settings.samples)
        ]

    def job(self, case: Case, source: Source, settings: Settings) -> Job:
        """Draw names, codes and where the others stand."""
        rng = rng_of(settings.seed, self.name, case.name)
        keys = int(case.params["keys"])
        vaults = [f"{name}-{rng.randint(2, 99)}" for name in rng.sample(NAMES, keys)]
        codes = [str(code) for code in rng.sample(range(10_000, 100_000), keys)]
        elsewhere = [(i + rng.random()) / max(1, keys - 1) for i in range(keys - 1)]
        found = needle_prompt(
            source.tokenizer,
            case.context,
            float(case.params["depth"]),
            vault=vaults[0],
            code=codes[0],
            others={v: (d, c) for v, d, c in zip(vaults[1:], elsewhere, codes[1:], strict=True)},
            source=source,
        )
        return Question(
            prompt=Prompt(ids=found.ids, question_tokens=found.question_tokens),
            new_tokens=min(NEW_TOKENS, len(source.tokens(f" {codes[0]}")) + 2),
            grade=partial(_grade, found),
            source=source,
        )

    def summary(self, metrics: Sequence[Mapping[str, float]]) -> float:
        """Return the share that was found."""
        return mean_score(metrics)


def _grade(prompt: NeedlePrompt, answer: str) -> dict[str, float]:
    return {"score": float(prompt.found(answer))}
