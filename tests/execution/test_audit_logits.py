"""The logit KL of the audit: against the stock model, over the stored keys, in every loop, and leaving no trace."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from rheo_offload import ConfigError, Engine, RheoConfig, offload, restore
from rheo_offload.errors import CacheError
from rheo_offload.execution.audit import Audit
from rheo_offload.execution.sampler import SamplingParams
from rheo_offload.model import hf_cache
from rheo_offload.model.learned_heads import HeadsInfo, save_heads
from rheo_offload.model.stepper import Stepper
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import FAMILIES, tiny_model
from tests.model.test_families import batch
from tests.selection.test_learned_bias import heads_of
from tests.test_end_to_end import BLOCK, prompt, sparse_config

LENGTHS = (131, 180)  # the first audited row is the one with padding
ROUNDING = 1e-6  # nats, fp32 logits


def config(method="mean_key", every=1, budget_blocks=6, **groups):
    return sparse_config(method, budget_blocks, audit={"every": every, "logits": True}, **groups)


def kl_of(dense, sparse):
    p, q = (logits.double().log_softmax(-1) for logits in (dense, sparse))
    return float((p.exp() * (p - q)).sum())


def first_step(model, lengths=LENGTHS, *, index=0, **kwargs):
    """Read all tokens but the last of a ragged batch, then decode that one: the step's logits [B, V].

    `index`: where they are in an output that is a tuple.
    """
    ids, mask = batch(lengths)
    cache = model.rheo.new_cache(max_length=256)
    model.rheo.prefill(cache, ids[:, :-1], mask[:, :-1])
    positions = mask.cumsum(1)[:, -1:] - 1
    given = dict(attention_mask=mask, position_ids=positions, past_key_values=cache) | kwargs
    with torch.no_grad():
        output = model(ids[:, -1:], **given)
    return (output[index] if isinstance(output, tuple) else output.logits)[:, -1]


def stock_logits(model, row, lengths=LENGTHS):
    """The stock model's logits [V] behind the last token of one row, read at once and alone."""
    ids, mask = batch(lengths)
    with torch.no_grad():
        return model(ids[row : row + 1, mask[row].bool()]).logits[0, -1]


def generate(model, new_tokens=12, rows=1, **options):
    ids = prompt(180, rows)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
    return made, model.rheo.stats()


# ---- the figure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_is_compared_with_the_stock_model(family):
    """Windows, sinks, soft caps, mixtures and padding: what is called dense is what the stock model computes."""
    model = tiny_model(family, device=DEVICE)
    dense = stock_logits(model, 0)
    offload(model, config(budget_blocks=4))
    sparse = first_step(model)[0]
    stats, want = model.rheo.stats(), kl_of(dense, sparse)
    assert stats.audited_logits == stats.audited_steps == 1
    assert stats.logit_kl_mean == stats.logit_kl_max == pytest.approx(want, rel=5e-5, abs=ROUNDING)
    assert (want > 100 * ROUNDING) == (family != "mistral-sliding"), "something was left out"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_full_budget_is_dense_decoding(family):
    """Every layer attends to everything, and the rows take turns: what is left is rounding."""
    model = offload(tiny_model(family, device=DEVICE), config(every=2, budget_blocks=32))
    stats = generate(model, rows=2)[1]
    assert stats.audited_logits == 6
    assert 0 <= stats.logit_kl_mean <= stats.logit_kl_max < ROUNDING


@pytest.mark.parametrize("tokens", [1, 2, BLOCK, BLOCK + 1])
def test_short_prompts(tokens):
    """No history at all, one token of it, a block that just closed."""
    model = offload(tiny_model("gpt_oss", device=DEVICE), config())
    ids = prompt(tokens)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    stats = model.rheo.stats()
    assert stats.audited_logits == 3 and stats.logit_kl_max < ROUNDING


@pytest.mark.parametrize("case", ["nosa", "remainder", "dense layer", "streamed layer", "tokens", "reuse"])
def test_a_step_is_compared_with_the_same_step_at_full_budget(case, tmp_path):
    """What a method does to the logits (a learned bias) is part of dense decoding; how it selects is not."""
    method, selection = {
        "nosa": ("nosa", {"params": {"weights": str(tmp_path / "heads.safetensors")}}),
        "remainder": ("mean_key", {"remainder": "centroid"}),
        "dense layer": ("mean_key", {"dense_layers": [0]}),
        "streamed layer": ("mean_key", {"dense_layers": [1]}),
        "tokens": ("token_select", {}),
        "reuse": ("mean_key", {"reuse_layers": {1: 0}}),
    }[case]
    info = HeadsInfo(model_type="llama", num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=16, method="nosa",
                     provenance="random")  # fmt: skip
    save_heads(tmp_path / "heads.safetensors", {i: h.tensors() for i, h in heads_of().items()}, info)
    if case == "tokens":
        selection |= {"params": {"tokens": 2 * BLOCK}}
    logits, stats = {}, {}
    for budget in (4, 32):
        model = tiny_model("llama", device=DEVICE)
        own = {} if case == "tokens" and budget == 32 else selection
        offload(
            model, config("full" if own is not selection else method, budget_blocks=budget, selection=own)
        )
        logits[budget] = first_step(model)[0]
        stats[budget] = model.rheo.stats()
    want = kl_of(logits[32], logits[4])
    assert want > 100 * ROUNDING
    assert stats[4].logit_kl_max == pytest.approx(want, rel=1e-3)
    assert stats[32].logit_kl_max < ROUNDING


def test_later_steps_are_compared_over_the_stored_keys(monkeypatch):
    """Steps 1 and 9: the stored keys and values, those of eight sparse steps too, go into the stock model's cache."""
    model = offload(tiny_model("llama", device=DEVICE), config(every=8))
    executors, seen = [], []
    model.rheo.on_executor = executors.append
    original = Audit.record_logits

    def spy(self, dense, sparse, present):
        kv = executors[0].cache
        pages, n = kv.host_table[0].clamp(min=0).long().cpu(), int(kv.step_lens[0]) - 1
        layers = []
        for layer in kv.full.values():
            stored = (
                t[pages].transpose(0, 1).flatten(1, 2)[None, :, :n].clone()
                for t in (layer.k_host, layer.v_host)
            )
            layers.append(tuple(stored))
        seen.append((n, layers, dense.clone(), sparse.clone()))
        original(self, dense, sparse, present)

    monkeypatch.setattr(Audit, "record_logits", spy)
    made, stats = generate(model)
    restore(model)
    stock = model.double()
    found = []
    for n, layers, dense, sparse in seen:
        cache = DynamicCache()
        for i, (k, v) in enumerate(layers):
            cache.update(k.double().to(model.device), v.double().to(model.device), i)
        position = torch.tensor([[n]], device=made.device)
        with torch.no_grad():
            want = stock(made[:, n : n + 1], position_ids=position, past_key_values=cache).logits[0, -1]
        assert (want - dense).norm() / want.norm() < 1e-5
        found.append(kl_of(want, sparse))
    assert [n for n, *_ in seen] == [179, 187] and min(found) > 100 * ROUNDING
    assert stats.logit_kl_mean == pytest.approx(sum(found) / 2, rel=1e-3)
    assert stats.logit_kl_max == pytest.approx(max(found), rel=1e-3)
    assert "logit KL to dense" in stats.table() and stats.to_dict()["audited_logits"] == 2


def test_what_has_no_probability_and_what_is_not_finite():
    audit = Audit(1, torch.device("cpu"))
    assert audit.logit_kl() == (0, None, None)
    yes, no = torch.tensor(True), torch.tensor(False)
    dense, sparse = torch.tensor([0.0, 1.0, -torch.inf]), torch.tensor([0.0, 2.0, -torch.inf])
    audit.record_logits(dense, sparse, yes)
    audit.record_logits(dense, -sparse.nan_to_num(), no)
    audit.record_logits(dense, torch.full((3,), torch.nan), yes)
    audit.record_logits(dense, torch.full((3,), 0.0).index_fill(0, torch.tensor(1), -torch.inf), yes)
    want = kl_of(dense[:2], sparse[:2])
    assert audit.logit_kl() == (1, pytest.approx(want), pytest.approx(want))


# ---- around it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_second_forward_leaves_no_trace(family):
    """Tokens, tables, heat, counters, keys and values are those of a run without it; only the audit reads more."""
    runs, read = [], []
    for watched in (True, False):
        model = tiny_model(family, device=DEVICE)
        settings = config()
        offload(model, replace(settings, audit=replace(settings.audit, logits=watched)))
        executors = []
        model.rheo.on_executor = executors.append
        made, stats = generate(model, new_tokens=20, rows=2)
        kv = executors[0].cache
        kv.check_integrity()
        state = [made, kv.seq_lens, kv.step, kv.host_table]
        for layer in kv.full.values():
            state += [layer.heat, layer.slot_of, layer.block_in, layer.last_used, layer.counters]
            state += [layer.traffic_of(purpose) for purpose in ("loaded", "warmed", "prefill", "streamed")]
            pages = kv.host_table[kv.host_table >= 0].long().cpu()
            state += [t[pages].nan_to_num() for t in (layer.k_host, layer.v_host)]
        for ring in kv.sliding.values():
            state += [ring.k_ring.nan_to_num(), ring.v_ring.nan_to_num()]
        runs.append([t.clone() for t in state])
        read.append(stats.audit_h2d_bytes)
        assert stats.audited_logits == (stats.audited_steps if watched else 0) and stats.audited_steps == 20
        assert (stats.logit_kl_mean is not None) == watched
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert read[0] > read[1] > 0


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.1}, {"graph": "off"}],
    ids=str,
)
def test_every_loop_of_generate_is_audited(options):
    options = dict(options)
    execution = {"graph": options.pop("graph", "auto")}
    model = offload(tiny_model("llama", device=DEVICE), config(every=4, execution=execution))
    stats = generate(model, new_tokens=9, **options)[1]
    assert stats.audited_logits == stats.audited_steps >= 2 and stats.logit_kl_mean > 100 * ROUNDING


@pytest.mark.parametrize("case", ["tuple", "tuple with a loss", "loss", "no positions"])
def test_a_forward_of_ones_own(case):
    """The output may be a tuple, with a loss ahead, and the model may count positions where no row is padded."""
    model = tiny_model("llama", device=DEVICE)
    dense = stock_logits(model, 0, (150, 150))
    offload(model, config())
    kwargs = {"position_ids": None} if case == "no positions" else {}
    if "tuple" in case:
        kwargs["return_dict"] = False
    if "loss" in case:
        kwargs["labels"] = torch.zeros(2, 1, dtype=torch.int64, device=model.device)
    sparse = first_step(model, (150, 150), index=int(case == "tuple with a loss"), **kwargs)[0]
    assert model.rheo.stats().logit_kl_mean == pytest.approx(kl_of(dense, sparse), rel=1e-3)


def test_a_second_forward_that_fails_is_the_end_of_the_cache(monkeypatch):
    """The token is stored by then: whoever caught the error and went on would store it twice."""
    model = offload(tiny_model("llama", device=DEVICE), config())

    def fail(*args):
        raise torch.cuda.OutOfMemoryError("no room for a whole row")

    ids = prompt(150)
    cache = model.rheo.new_cache(max_length=256)
    model.rheo.prefill(cache, ids)
    monkeypatch.setattr(hf_cache, "attend_again", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError), torch.no_grad():
        model(ids[:, -1:], past_key_values=cache)
    monkeypatch.undo()
    with pytest.raises(CacheError, match="start a new cache"), torch.no_grad():
        model(ids[:, -1:], past_key_values=cache)


def test_hooks_of_others_see_the_steps_only():
    model = offload(tiny_model("llama", device=DEVICE), config())
    seen = []
    with model.register_forward_pre_hook(lambda *args: seen.append(1)):
        stats = generate(model, new_tokens=5)[1]
    prompt_forwards = -(-179 // 48)
    assert len(seen) == prompt_forwards + stats.decode_steps


@pytest.mark.gpu
def test_captured_steps_are_measured_in_between():
    """Replayed steps and audited ones in turn: tokens and figures of a run that is never captured."""
    made = {}
    for graph in ("auto", "off"):
        model = offload(tiny_model("llama", device=DEVICE), config(every=8, execution={"graph": graph}))
        tokens, stats = generate(model, new_tokens=40)
        made[graph] = tokens.tolist(), stats.audited_logits, stats.logit_kl_mean, stats.logit_kl_max
        if graph == "auto":
            assert model.rheo._last.stepper.runner.captures == 1
    assert made["auto"][:2] == made["off"][:2] and made["auto"][1] == 5
    assert made["auto"][2:] == pytest.approx(made["off"][2:], rel=1e-4)


def test_rows_of_an_engine_are_measured_in_turn():
    """Two requests of other lengths: each audited row stands at its own position."""
    kl = {}
    for budget in (4, 32):
        model = offload(tiny_model("llama", device=DEVICE), config(every=2, budget_blocks=budget))
        with Engine(model, max_rows=2, max_context_tokens=256) as engine:
            engine.generate([prompt(180)[0], prompt(131)[0]], SamplingParams(max_new_tokens=8))
            stats = engine.stats()
        assert stats.audited_logits >= 4
        kl[budget] = stats.logit_kl_max
    assert kl[32] < ROUNDING < 100 * ROUNDING < kl[4]


def test_a_row_that_sits_a_step_out_is_not_measured():
    """The first step audits row 0, which takes no part; the second audits row 1, the third row 0 in its first step."""
    model = tiny_model("gemma3", device=DEVICE)
    ids, mask = batch(LENGTHS)
    dense = stock_logits(model, 0)
    offload(model, config(budget_blocks=4, execution={"graph": "off"}))
    cache = model.rheo.new_cache(max_length=256)
    model.rheo.prefill(cache, ids[:, :-1], mask[:, :-1])
    stepper, kv = Stepper.over(model, cache), cache.executor.cache
    stepper.ids.copy_(ids[:, -1:])
    counts, sparse = [], []
    hook = model.register_forward_hook(lambda m, args, out: sparse.append(out.logits[0, -1].clone()))
    # row 1 goes on alone for two steps
    for active, rows in ((0, [1]), (0, [1]), (1, [0, 1])):
        kv.active[0] = active
        stepper.read(stepper.launch(rows))
        counts.append(model.rheo.stats().audited_logits)
    hook.remove()
    assert counts == [0, 1, 2]
    total = model.rheo.stats()
    kls = {total.logit_kl_max, 2 * total.logit_kl_mean - total.logit_kl_max}
    assert any(kl == pytest.approx(kl_of(dense, sparse[2]), rel=1e-3) for kl in kls)


def test_it_is_off_unless_asked_for_and_restore_takes_the_hook_off():
    model = tiny_model("llama", device=DEVICE)
    before = len(model._forward_hooks)
    offload(model, sparse_config())
    assert len(model._forward_hooks) == before and not RheoConfig().audit.logits
    restore(model)
    offload(model, config())
    assert len(model._forward_hooks) == before + 1
    restore(model)
    assert len(model._forward_hooks) == before


def test_where_it_cannot_work_it_is_refused():
    with pytest.raises(ConfigError, match="audit.every.*above 0 for audit.logits"):
        config(every=0)
    with pytest.raises(ConfigError, match="LlamaModel has none; set audit.logits=false"):
        offload(tiny_model("llama", device=DEVICE).model, config())
