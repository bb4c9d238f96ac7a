"""Three tasks in the manner of RULER (arXiv:2404.06654), over this package's own text.

`values`: four codes of one vault, planted apart, must all be named. `variables`: a chain of assignments, and which
variables hold a value. `words`: a long list, and which words occur most often. The score is the share named.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from random import Random

from rheo_offload.eval.needle import NAMES
from rheo_offload.eval.prompts import Prompt, Source, contains, rng_of
from rheo_offload.eval.task import Case, Job, Question, Settings, mean_score

__all__ = ["Ruler"]

KINDS = ("values", "variables", "words")
VALUES, HOPS, COMMON = 4, 4, 5
NEW_TOKENS = 64
"""At most; the answer decides."""
COMMON_TIMES, RARE_TIMES = 30, 3
"""How often a common and a rare word stand in the list, as in the paper; fewer in a short list."""


class Ruler:
    """Retrieve several things, follow a chain, count."""

    name = "ruler"
    needs_reference = False
    prefills_question = True

    def cases(self, settings: Settings) -> list[Case]:
        """Return one case per context, kind and sample."""
        return [
            Case(
                task=self.name,
                params={"context": n, "kind": kind, "sample": sample},
                new_tokens=NEW_TOKENS,
            )
            for n in settings.contexts
            for kind in KINDS
            for sample in range(settings.samples)
        ]

    def job(self, case: Case, source: Source, settings: Settings) -> Job:
        """Draw names and numbers and build the prompt."""
        rng = rng_of(settings.seed, self.name, case.name)
        build = {"values": _values, "variables": _variables, "words": _words}[str(case.params["kind"])]
        prompt, wanted = build(rng, source, case.context)
        return Question(
            prompt=prompt,
            new_tokens=min(NEW_TOKENS, len(source.tokens(" " + ", ".join(wanted))) + 8),
            grade=partial(_grade, wanted),
            source=source,
        )

    def summary(self, metrics: Sequence[Mapping[str, float]]) -> float:
        """Return the mean share that was named."""
        return mean_score(metrics)


def _grade(wanted: Sequence[str], answer: str) -> dict[str, float]:
    return {"score": sum(contains(answer, word) for word in wanted) / len(wanted)}


def _spread(rng: Random, count: int) -> list[float]:
    """Return ascending depths, one in each of `count` equal parts."""
    return [(i + rng.random()) / count for i in range(count)]


def _values(rng: Random, source: Source, num_tokens: int) -> tuple[Prompt, list[str]]:
    vault = f"{rng.choice(NAMES)}-{rng.randint(2, 99)}"
    codes = [str(code) for code in rng.sample(range(10_000, 100_000), VALUES)]
    facts = [
        (depth, f"One of the access codes of vault {vault} is {code}.")
        for depth, code in zip(_spread(rng, VALUES), codes, strict=True)
    ]
    question = f"The {VALUES} access codes of vault {vault} that the text names are"
    return source.buried(num_tokens, facts, question), codes


def _variables(rng: Random, source: Source, num_tokens: int) -> tuple[Prompt, list[str]]:
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 2 * (HOPS + 1):
        name = "".join(rng.choices(letters, k=5))
        names += [] if name in names else [name]
    value, other = (str(v) for v in rng.sample(range(10_000, 100_000), 2))
    chain, decoy = names[: HOPS + 1], names[HOPS + 1 :]
    facts = []
    for held, members in ((value, chain), (other, decoy)):
        texts = [f"VAR {members[0]} = {held}"]
        texts += [f"VAR {new} = VAR {old}" for old, new in zip(members, members[1:], strict=False)]
        facts += list(zip(_spread(rng, HOPS + 1), texts, strict=True))
    question = f"By the assignments in the text above, {HOPS + 1} variables have the value {value}. They are:"
    return source.buried(num_tokens, facts, question), chain


def _words(rng: Random, source: Source, num_tokens: int) -> tuple[Prompt, list[str]]:
    per_entry = (
        len(source.tokens(" ".join(f"{i}. {word}" for i, word in enumerate(source.words[:200])))) / 200
    )
    entries = int(num_tokens / per_entry)
    common_times = max(RARE_TIMES + 1, min(COMMON_TIMES, entries // (4 * COMMON)))
    rare = -(-max(1, entries - COMMON * common_times) // RARE_TIMES)
    chosen = rng.choices(source.words, k=rare)  # a word drawn twice is still rare
    common = rng.sample(sorted(set(source.words) - set(chosen)), COMMON)
    listed = [word for word in common for _ in range(common_times)]
    listed += [word for word in chosen for _ in range(RARE_TIMES)]
    rng.shuffle(listed)
    question = f"The {COMMON} words that occur most often in the list above are:"
    lines = (f"{i}. {word}\n" for i, word in enumerate(listed, 1))
    return source.filled(num_tokens, lines, "", question), common
