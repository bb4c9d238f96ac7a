"""The recall task: answers follow from the records alone, records crowd where a layout says so."""

import pytest
import torch
from transformers import DynamicCache

from rheo_offload import RheoConfig, offload, restore
from rheo_offload.eval import recall
from rheo_offload.eval.recall import ask, draw_layout, draw_sequence, make_batch
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model


def questions(context, seed, tokens=100):
    return draw_sequence(context, tokens, seed)


@pytest.mark.parametrize("context", [64, 300, 1024])
def test_every_answer_follows_from_the_records_alone(context):
    for seed in range(20):
        layout, ids = questions(context, seed)
        row = ids[0].tolist()
        records, record = [], None
        for token in row[: layout.context_tokens]:
            if token == recall.OPEN:
                record = []
            elif token == recall.CLOSE:
                records.append(record)
                record = None
            elif record is not None:
                record.append(token)
        after = {r[0]: r for r in records}
        assert len(after) == len(records) and record is None and len(row) == context
        for q in layout.questions:
            assert row[q.start - 1] == recall.ASK and row[q.end] == recall.CLOSE
            answer = row[q.start : q.end]
            if q.task == "copying":
                assert answer == after[answer[0]]
            else:
                links = [after[a] for a in answer[:-1]]
                assert [link[1] for link in links] == answer[1:]
                assert answer[-1] not in after


def test_records_of_a_hot_layout_stand_close_together():
    layout = next(
        lay
        for seed in range(50)
        if (lay := draw_layout(4096, 200, torch.Generator().manual_seed(seed))).hot_regions
    )
    ids = make_batch(layout, 2, torch.Generator().manual_seed(0))[:, : layout.context_tokens]
    first = layout.context_tokens - (layout.context_tokens - 1) // recall.SLOT * recall.SLOT
    for row in ids:
        places = (row == recall.OPEN).nonzero()[:, 0]
        assert len(((places - first) // 64).unique()) <= layout.hot_regions


def test_no_room_is_refused():
    with pytest.raises(ValueError, match="no room"):
        draw_layout(10, 100, torch.Generator())


def test_questions_asked_turn_by_turn_get_the_stock_answers():
    """With everything attended, the conversation is the one that the stock model has."""
    model = tiny_model("llama", vocab_size=len(recall.VOCABULARY), device=DEVICE)
    layout, ids = questions(300, seed=4, tokens=40)
    wanted, turn = [], ids[:, : layout.context_tokens].to(DEVICE)
    for q in layout.questions:
        prompt = torch.cat((turn, ids[:, q.start - 1 : q.start + 1].to(DEVICE)), 1)
        turn = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=q.end - q.start, do_sample=False
        )
        wanted.append((q, turn[0, prompt.shape[1] :].tolist()))
    assert list(ask(model, ids, layout, cache=DynamicCache(config=model.config))) == wanted
    offload(model, RheoConfig.from_dict({"selection": {"token_budget": 512, "sink_blocks": 1}}))
    assert list(ask(model, ids, layout)) == wanted and len(wanted) > 2
    restore(model)
