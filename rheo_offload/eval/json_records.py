"""Structured output: a long shipping log, three lines of which must come back as JSON, field by field.

Two worked examples stand after the log, so that a base model knows the form. The log fills the context.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from rheo_offload.errors import RheoError
from rheo_offload.eval.prompts import Source, rng_of
from rheo_offload.eval.task import Case, Job, Question, Settings, mean_score

__all__ = ["JsonRecords"]

ASKED = 3
"""Records in a row that are asked for."""
NEW_TOKENS = 512
"""At most; the answer decides."""
FIRST_ID = 1000
GOODS = ("barley", "copper", "linen", "olives", "paper", "resin", "salt", "timber", "tin", "wool")
PORTS = ("Bergen", "Cadiz", "Genoa", "Lisbon", "Malmo", "Odessa", "Rostock", "Split", "Tunis", "Varna")
STATES = ("delivered", "delayed", "in transit", "returned")


class JsonRecords:
    """Copy three records of a long log into JSON lines."""

    name = "json"
    needs_reference = False
    prefills_question = True

    def cases(self, settings: Settings) -> list[Case]:
        """Return one case per context, depth and sample."""
        return [
            Case(
                task=self.name,
                params={"context": n, "depth": depth, "sample": sample},
                new_tokens=NEW_TOKENS,
            )
            for n in settings.contexts
            for depth in settings.depths
            for sample in range(settings.samples)
        ]

    def job(self, case: Case, source: Source, settings: Settings) -> Job:
        """Write as many records as fit and ask for those at the case's depth."""
        rng = rng_of(settings.seed, self.name, case.name)
        records = list(_records(rng, count=max(4 * ASKED, case.context // 8)))
        example = "".join(_asked(records[i : i + ASKED], answered=True) for i in (0, ASKED))
        # how many fit is known once they are counted; the question names records among them
        room = case.context - len(source.tokens(example + _asked(records[:ASKED], answered=False))) - 8
        fit, used = 0, 0
        while fit < len(records) and (used := used + len(source.tokens(_line(records[fit])))) <= room:
            fit += 1
        if fit < 3 * ASKED:
            raise RheoError(
                f"a log of {case.context} tokens has no room for {3 * ASKED} records and the examples"
            )
        first = min(max(2 * ASKED, round(float(case.params["depth"]) * fit)), fit - ASKED)
        wanted = records[first : first + ASKED]
        question = _asked(wanted, answered=False)
        prompt = source.filled(case.context, map(_line, records[:fit]), f"\n{example}".rstrip("\n"), question)
        answer = _answer(wanted)
        return Question(
            prompt=prompt,
            new_tokens=min(NEW_TOKENS, len(source.tokens(answer)) + 8),
            grade=partial(grade, wanted),
            source=source,
        )

    def summary(self, metrics: Sequence[Mapping[str, float]]) -> float:
        """Return the mean share of fields that are right."""
        return mean_score(metrics)


def grade(wanted: Sequence[Mapping[str, Any]], answer: str) -> dict[str, float]:
    """Compare JSON lines with the records, by id.

    Returns:
        `score` and `fields`: share of fields equal; `records`: share of records equal in every field; `parsed`: share
        of the lines asked for that are JSON objects.
    """
    found: list[dict[str, Any]] = []
    for line in answer.strip().splitlines()[: len(wanted)]:
        try:
            value = json.loads(line.strip().rstrip(","))
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    by_id = {str(record.get("id")): record for record in found}
    fields = exact = 0
    for record in wanted:
        got = by_id.get(str(record["id"]), {})
        equal = [key in got and got[key] == value for key, value in record.items()]
        fields += sum(equal)
        exact += got == record
    share = fields / sum(len(record) for record in wanted)
    return {
        "score": share,
        "fields": share,
        "records": exact / len(wanted),
        "parsed": len(found) / len(wanted),
    }


def _records(rng: Random, *, count: int) -> Iterator[dict[str, Any]]:
    for i in range(count):
        yield {
            "id": FIRST_ID + i,
            "crates": rng.randint(2, 99),
            "goods": rng.choice(GOODS),
            "port": rng.choice(PORTS),
            "state": rng.choice(STATES),
        }


def _line(record: Mapping[str, Any]) -> str:
    return "Shipment {id}: {crates} crates of {goods} to {port}, {state}.\n".format(**record)


def _answer(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _asked(records: Sequence[Mapping[str, Any]], *, answered: bool) -> str:
    question = f"Shipments {records[0]['id']} to {records[-1]['id']} as JSON lines:\n"
    return f"{question}{_answer(records)}\n" if answered else question
