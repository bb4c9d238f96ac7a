"""Three tasks in the manner of RULER (arXiv:2404.06654), over this package's own text.

`values`: four codes of one vault, planted apart, must all be named. `variables`: a chain of assignments, and which
variables hold a value. `words`: a long list, and which words occur most often. A worked example shows the form, so that
base models can follow. The score is the share named.
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
    names = rng.sample(NAMES, 2)
    vault, known = (f"{name}-{rng.randint(2, 99)}" for name in names)
    codes = [str(code) for code in rng.sample(range(10_000, 100_000), 2 * VALUES)]

    def told(of: str, code: str) -> str:
        return f"One of the access codes of vault {of} is {code}."

    def asked(of: str) -> str:
        return f"The {VALUES} access codes of vault {of} are:"

    facts = [(depth, told(vault, code)) for depth, code in zip(_spread(rng, VALUES), codes, strict=False)]
    shown = codes[VALUES:]
    example = "\n\n".join(["", *(told(known, code) for code in shown), f"{asked(known)} {', '.join(shown)}."])
    return source.buried(num_tokens, facts, asked(vault), ending=example), codes[:VALUES]


def _variables(rng: Random, source: Source, num_tokens: int) -> tuple[Prompt, list[str]]:
    names: list[str] = []
    while len(names) < 3 * (HOPS + 1):
        name = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=4))
        names += [] if name in names else [name]
    values = [str(v) for v in rng.sample(range(10_000, 100_000), 3)]
    chains = [names[i : i + HOPS + 1] for i in range(0, len(names), HOPS + 1)]

    def told(chain: Sequence[str], value: str) -> list[str]:
        links = [f"VAR {new} = VAR {old}" for old, new in zip(chain, chain[1:], strict=False)]
        return [f"VAR {chain[0]} = {value}", *links]

    def asked(value: str) -> str:
        return f"The {HOPS + 1} variables with the value {value} are:"

    facts = [
        fact
        for chain, value in zip(chains[:2], values, strict=False)
        for fact in zip(_spread(rng, HOPS + 1), told(chain, value), strict=True)
    ]
    example = "\n\n".join(["", *told(chains[2], values[2]), f"{asked(values[2])} {', '.join(chains[2])}."])
    return source.buried(num_tokens, facts, asked(values[0]), ending=example), chains[0]


def _words(rng: Random, source: Source, num_tokens: int) -> tuple[Prompt, list[str]]:
    drawn = rng.sample(source.words, 2 * COMMON)
    shown, common = drawn[:COMMON], drawn[COMMON:]
    others = sorted(set(source.words) - set(drawn))
    example = _listed(rng, shown, 3, rng.sample(others, COMMON), 1)
    first = f"List 1\n{''.join(_numbered(example))}{_most_often(1)} {', '.join(shown)}.\n\nList 2\n"
    room = num_tokens - len(source.tokens(first + _most_often(2)))
    per_entry = len(source.tokens("".join(_numbered(others[:200])))) / 200
    entries = int(1.1 * room / per_entry) + COMMON  # a little too many; the end is cut off
    times = max(RARE_TIMES + 1, min(COMMON_TIMES, entries // (4 * COMMON)))
    rare = rng.choices(others, k=-(-max(1, entries - COMMON * times) // RARE_TIMES))
    listed = _listed(rng, common, times, rare, RARE_TIMES)
    return source.filled(num_tokens, [first, *_numbered(listed)], "", _most_often(2)), common


def _listed(
    rng: Random, common: Sequence[str], times: int, rare: Sequence[str], rare_times: int
) -> list[str]:
    """Return a shuffled list; a rare word that was drawn twice is still rare."""
    words = [word for word in common for _ in range(times)] + [w for w in rare for _ in range(rare_times)]
    rng.shuffle(words)
    return words


def _numbered(words: Sequence[str]) -> list[str]:
    return [f"{i}. {word}\n" for i, word in enumerate(words, 1)]


def _most_often(number: int) -> str:
    return f"The {COMMON} words that occur most often in list {number} are:"
