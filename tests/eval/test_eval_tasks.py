"""What the tasks ask: the same for the same seed, of the right length, with the answer in the text and a fair grade."""

import json
import math

import pytest
import torch

from rheo_offload.errors import RheoError
from rheo_offload.eval.json_records import grade
from rheo_offload.eval.long_generation import repetition
from rheo_offload.eval.needle import Needle
from rheo_offload.eval.prompts import Source, contains
from rheo_offload.eval.suite import TASKS
from rheo_offload.eval.task import Case, Question, Settings

SETTINGS = Settings(contexts=(1500,), depths=(0.1, 0.8), samples=2, scored_tokens=32, long_tokens=16)
QUESTIONS = ("needle", "ruler", "json")


def jobs(task: str, source: Source, settings: Settings = SETTINGS):
    found = TASKS[task]
    return {case.name: found.job(case, source, settings) for case in found.cases(settings)}


@pytest.mark.parametrize("task", TASKS)
def test_cases_have_names_of_their_own_and_fit(task, source):
    cases = TASKS[task].cases(SETTINGS)
    assert len({case.name for case in cases}) == len(cases) > 0
    for case, job in zip(cases, jobs(task, source).values(), strict=True):
        assert job.tokens <= case.context + case.new_tokens


@pytest.mark.parametrize("task", QUESTIONS)
def test_questions_depend_on_the_seed_alone(task, source):
    first, again = jobs(task, source), jobs(task, source)
    other = jobs(task, source, Settings(contexts=(1500,), depths=(0.1, 0.8), samples=2, seed=1))
    for name, job in first.items():
        assert torch.equal(job.prompt.ids, again[name].prompt.ids)
        assert not torch.equal(job.prompt.ids, other[name].prompt.ids)
    ids = [tuple(job.prompt.ids[0].tolist()) for job in first.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("task", QUESTIONS)
def test_prompts_have_the_length_and_end_with_the_question(task, source):
    for job in jobs(task, source).values():
        assert 1500 - 60 < job.prompt.ids.shape[1] <= 1500
        assert job.prompt.ids[0, 0] == source.tokenizer.bos_token_id
        asked = source.tokenizer.decode(job.prompt.ids[0, -job.prompt.question_tokens :])
        assert asked.endswith((" is", " are", ":", ":\n"))


def text_of(job: Question) -> str:
    return job.source.tokenizer.decode(job.prompt.ids[0])


def test_needles_stand_where_they_should(source):
    for name, job in jobs("needle", source).items():
        text = text_of(job)
        prompt = job.grade.args[0]
        question = source.tokenizer.decode(job.prompt.ids[0, -job.prompt.question_tokens :])
        assert text.count(f"{question} {prompt.answer}.") == 1
        assert text.count("The access code of vault") == (2 if "keys=1" in name else 5)
        depth = len(source.tokens(text[: text.index(f"{question} {prompt.answer}.")])) / 1500
        assert depth < 0.3 if "depth=0.1" in name else depth > 0.3
        assert job.grade(f" {prompt.answer}.") == {"score": 1.0} and job.grade(" 00000.") == {"score": 0.0}


def test_ruler_names_what_it_wants(source):
    found = jobs("ruler", source)
    for name, job in found.items():
        wanted = job.grade.args[0]
        text = text_of(job)
        assert job.grade(", ".join(wanted))["score"] == 1.0
        assert job.grade(wanted[0])["score"] == 1 / len(wanted)
        assert job.grade("".join(wanted))["score"] == 0.0, "a word inside another is not named"
        if "values" in name:
            assert all(text.count(f"is {code}.") == 1 for code in wanted)
        if "variables" in name:
            chain = [f"VAR {new} = VAR {old}" for old, new in zip(wanted, wanted[1:], strict=False)]
            places = [text.index(link) for link in chain]
            assert places == sorted(places)
        if "words" in name:
            listed = [line.split(". ")[1] for line in text.split("List 2\n")[1].split("\n\n")[0].splitlines()]
            others = [word for word in listed if word not in wanted]
            # the list is shuffled and cut where the prompt is full
            assert all(word in listed for word in wanted)
            assert (len(listed) - len(others)) / 5 > len(others) / len(set(others))


def test_json_records_stand_in_the_log_and_not_in_the_examples(source):
    for job in jobs("json", source).values():
        wanted, text = job.grade.args[0], text_of(job)
        for record in wanted:
            line = "Shipment {id}: {crates} crates of {goods} to {port}, {state}.".format(**record)
            assert text.count(line) == 1
            assert json.dumps(record) not in text
        assert text.count(" as JSON lines:") == 3


def test_json_grades_fields_and_records():
    wanted = [{"id": 1, "goods": "salt", "crates": 4}, {"id": 2, "goods": "tin", "crates": 5}]
    lines = [json.dumps(record) for record in wanted]
    assert grade(wanted, "\n".join(lines)) == {"score": 1.0, "fields": 1.0, "records": 1.0, "parsed": 1.0}
    swapped = grade(wanted, "\n".join(reversed(lines)))
    assert swapped["fields"] == 1.0, "records are compared by id"
    half = grade(wanted, lines[0].replace("salt", "wool") + "\nnot json")
    assert half == {"score": 2 / 6, "fields": 2 / 6, "records": 0.0, "parsed": 0.5}
    assert grade(wanted, lines[0] + "\n" + json.dumps({**wanted[1], "more": 1}))["records"] == 0.5
    assert grade(wanted, "")["score"] == 0.0
    assert grade(wanted, '"text"\n[1]')["parsed"] == 0.0


def test_windows_of_the_text(source):
    perplexity, kl = jobs("perplexity", source), jobs("kl", source)
    first, second = perplexity.values()
    assert len(first.script) == 1500 + 32 and first.start == 1499
    assert torch.equal(first.script[1 + 32 :], second.script[1:-32])
    assert [j.script.tolist() for j in kl.values()] == [j.script.tolist() for j in perplexity.values()]


def test_summaries():
    assert TASKS["needle"].summary([{"score": 1.0}, {"score": 0.0}]) == 0.5
    two = [{"nll": 1.0, "tokens": 3.0}, {"nll": 2.0, "tokens": 1.0}]
    assert TASKS["perplexity"].summary(two) == pytest.approx(math.exp(5 / 4))
    assert TASKS["kl"].summary([{"kl": 1.0, "tokens": 3.0}, {"kl": 2.0, "tokens": 1.0}]) == pytest.approx(
        1.25
    )


def test_repetition():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([7] * 13) == pytest.approx(0.9)
    assert repetition([1, 2]) == 0.0


def test_contains_whole_words():
    assert contains("codes 12, 345.", "345") and not contains("codes 1345", "345")


def test_a_text_that_is_too_short_is_refused(source):
    short = Source(source.tokenizer, ["A few words."])
    case = Case(task="needle", params={"context": 900, "depth": 0.5, "keys": 1, "sample": 0}, new_tokens=8)
    with pytest.raises(RheoError, match="too few .*--text"):
        Needle().job(case, short, SETTINGS)


def test_a_context_without_room_is_refused(source):
    for task in QUESTIONS:
        with pytest.raises(RheoError, match="no room"):
            jobs(task, source, Settings(contexts=(40,), depths=(0.5,)))
