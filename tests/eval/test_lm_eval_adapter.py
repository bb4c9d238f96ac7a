"""The harness's three kinds of request, against the stock model at full budget, and one task from end to end."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness")

from lm_eval.api.instance import Instance

from rheo_offload.errors import ConfigError, RheoError
from rheo_offload.eval.lm_eval_adapter import RheoLM

SMALL = {"cache.block_size": 16, "cache.device_memory": "floor"}
TEXT = (
    "The quick brown fox jumps over the lazy dog and runs through the old forest until the night comes. " * 3
)


@pytest.fixture(scope="module")
def lm(model_dir):
    return RheoLM(str(model_dir), device="cpu", **SMALL, **{"selection.token_budget": 1024})


@pytest.fixture(scope="module")
def stock(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def dense_score(stock, context, continuation):
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logprobs = stock(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    target = torch.tensor(continuation)
    return float(logprobs.gather(1, target[:, None]).sum()), torch.equal(logprobs.argmax(-1), target)


def test_loglikelihood(lm, stock):
    pairs = [(TEXT, " and then"), (TEXT[:40], TEXT[40:60]), ("", "no context")]
    for (context, continuation), got in zip(
        pairs, lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True), strict=True
    ):
        if context:
            ids = lm._encode_pair(context, continuation)
        else:
            ids = [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
        want = dense_score(stock, *ids)
        assert got[0] == pytest.approx(want[0], abs=1e-2) and got[1] is want[1]


def test_greedy_is_noticed(lm, stock):
    context = lm.tok_encode(TEXT)
    with torch.no_grad():
        best = int(stock(torch.tensor([context])).logits[0, -1].argmax())
    assert lm.score(context, [best])[1] and not lm.score(context, [best - 1])[1]
    assert lm.score(context[:1], [best])[0] == pytest.approx(
        dense_score(stock, context[:1], [best])[0], abs=1e-3
    )


def test_rolling_counts_every_token_once(lm, stock, model_dir):
    short = RheoLM(str(model_dir), device="cpu", max_length=64, **SMALL, **{"selection.token_budget": 1024})
    request = instances("loglikelihood_rolling", (TEXT,))
    ids = lm.tok_encode(TEXT, add_special_tokens=False)
    want = dense_score(stock, [lm.prefix_token_id], ids)[0]
    assert lm.loglikelihood_rolling(request, disable_tqdm=True)[0] == pytest.approx(want, abs=5e-2)
    windowed = short.loglikelihood_rolling(request, disable_tqdm=True)[0]
    assert windowed < 0 and windowed != pytest.approx(want, abs=1.0)


def test_generation_stops_where_it_should(lm, stock):
    ids = torch.tensor([lm.tok_encode(TEXT)])
    with torch.no_grad():
        made = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = lm.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    stop = text[len(text) // 2 :][:3]
    asked = [(TEXT, {"until": [], "max_gen_toks": 12}), (TEXT, {"until": [stop], "max_gen_toks": 12})]
    whole, cut = lm.generate_until(instances("generate_until", *asked), disable_tqdm=True)
    assert whole == text and cut == text[: text.index(stop)]


def test_the_tail_of_the_context_is_decoded(model_dir):
    plain, tailed = (
        RheoLM(str(model_dir), device="cpu", decode_tail_tokens=n, **SMALL, **{"selection.token_budget": 48})
        for n in (1, 32)
    )
    context, continuation = plain.tok_encode(TEXT), [5, 9]
    assert plain.score(context, continuation)[0] != pytest.approx(tailed.score(context, continuation)[0])


def test_refusals(lm, model_dir):
    for more, message in (
        ({"selection": 3}, "model_args has no 'selection'"),
        ({"batch_size": 8}, "batch_size must be 1"),
        ({"decode_tail_tokens": 0}, "decode_tail_tokens"),
    ):
        with pytest.raises(RheoError, match=message):
            RheoLM(str(model_dir), **more)
    with pytest.raises(ConfigError, match="did you mean"):
        RheoLM(str(model_dir), **{"cache.block_sze": 16})
    with pytest.raises(RheoError, match="greedily"):
        lm.generate_until(instances("generate_until", (TEXT, {"do_sample": True, "temperature": 1.0})), True)
    with pytest.raises(RheoError, match="no room"):
        lm.generate_until(instances("generate_until", (TEXT, {"max_gen_toks": 5000})), True)
    with pytest.raises(RheoError, match="continuation"):
        lm.score([1, 2], [])


def test_a_task_from_end_to_end(lm, tmp_path, model_dir):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    docs = [{"question": f"{TEXT[:80]} {i}", "answer": "night"} for i in range(3)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'docs.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: 0\ndoc_to_choice: [night, day]\nmetric_list: [{metric: acc}]\n"
    )
    found = simple_evaluate(
        model="rheo",
        model_args={"pretrained": str(model_dir), "selection.token_budget": 64, **SMALL},
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
    )
    assert found["results"]["tiny_choice"]["acc,none"] in (0.0, 1 / 3, 2 / 3, 1.0)
