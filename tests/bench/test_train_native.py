"""Native training: its attention against a row-by-row truth and the runtime's own ops, the recall task, a short run."""

import json
from dataclasses import replace

import pytest
import torch

from bench import train_native
from bench.native_attention import (
    Geometry,
    ImportanceHead,
    Pass,
    alignment,
    native_attention,
    ranking_scores,
    select_blocks,
)
from csrc_free_kernels.reference.score_windows import score_windows
from csrc_free_kernels.reference.select import select
from rheo_offload.eval import recall
from rheo_offload.model.learned_heads import bias_heads, read_heads
from rheo_offload.model.specs import layer_specs

SMALL = Geometry(block_size=16, unit=4, budget=6, sink=1, recent=2, agnostic=1)
BATCH, HEADS, GROUP, DIM, TOKENS, FIRST = 2, 2, 3, 8, 203, 150
SCALE = 0.7


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(3)
    q = torch.randn(BATCH, HEADS * GROUP, TOKENS, DIM, generator=g, dtype=torch.float64)
    k, v = (torch.randn(BATCH, HEADS, TOKENS, DIM, generator=g, dtype=torch.float64) for _ in range(2))
    head = ImportanceHead(HEADS, DIM)
    torch.nn.init.normal_(head.A, generator=g)
    torch.nn.init.normal_(head.delta.weight, generator=g)
    return q.float(), k.float(), v.float(), head


def runtime_selection(q, k, cis, position, geometry):
    """Score and select as the runtime's reference ops do for one decode step; int32 [B, Hkv, budget]."""
    batch, heads = k.shape[:2]
    length, size, unit = position + 1, geometry.block_size, geometry.unit
    blocks = -(-length // size)

    def units(x):  # [B, Hkv, length, E] -> pages [B * N, Hkv, W, E]; what is not finished is poisoned
        padded = torch.full((batch, heads, blocks * size, x.shape[-1]), torch.nan)
        padded[:, :, : length // unit * unit] = x[:, :, : length // unit * unit]
        return padded.view(batch, heads, blocks, -1, unit, x.shape[-1]).mean(4).transpose(1, 2).flatten(0, 1)

    table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
    lens = torch.full((batch,), length, dtype=torch.int32)
    scores = torch.empty(batch, heads, blocks)
    score_windows(
        q[:, :, position], units(k).nan_to_num(7.0), table, lens, None, None, scores,
        softmax_scale=SCALE, block_size=size,
    )  # fmt: skip
    parts = units(cis[..., None])[..., 0].unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2)
    windows = (parts[..., :-1] + parts[..., 1:]) / 2
    pooled = torch.full((batch, heads, blocks), -torch.inf)
    per_block = size // unit
    for n in range(blocks):
        touching = windows[..., max(0, per_block * n - 1) : per_block * n + per_block]
        if touching.shape[-1]:
            pooled[..., n] = touching.nan_to_num(-torch.inf).amax(-1)
    ids = torch.empty(batch, heads, geometry.budget, dtype=torch.int32)
    select(
        scores, pooled, lens, ids, torch.empty(batch, heads, dtype=torch.int32), block_size=size,
        sink_blocks=geometry.sink, recent_blocks=geometry.recent, query_blocks=geometry.query,
        agnostic_blocks=geometry.agnostic, heat_decay=1.0, normalise="none",
    )  # fmt: skip
    return ids


@pytest.mark.parametrize("recent", [1, 2])
def test_selection_is_that_of_the_runtime_step_by_step(tensors, recent):
    q, k, v, head = tensors
    geometry = Geometry(block_size=16, unit=4, budget=6, sink=1, recent=recent, agnostic=2)
    cis = head(v)
    scores, importance = ranking_scores(q[:, :, FIRST:], k, cis, FIRST, SCALE, geometry)
    chosen = select_blocks(scores, importance, FIRST, geometry)
    for position in range(FIRST, TOKENS):
        ids = runtime_selection(q, k, cis.detach(), position, geometry)
        for b in range(BATCH):
            for h in range(HEADS):
                got = chosen[b, h, position - FIRST].nonzero()[:, 0].tolist()
                assert got == [i for i in ids[b, h].tolist() if i >= 0], (position, b, h)


@pytest.mark.parametrize("geometry", [SMALL, None])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_the_plain_sum_over_selected_keys(tensors, geometry, bias):
    q, k, v, head = tensors
    layer = torch.nn.Module()
    layer.importance = head
    native = Pass(context_tokens=FIRST, geometry=geometry, bias=bias)
    got, _ = native_attention(layer, q, k, v, None, scaling=SCALE, native=native)
    cis = head(v).detach() if bias else torch.zeros(BATCH, HEADS, TOKENS)
    for position in (0, 17, FIRST - 1, FIRST, FIRST + 1, TOKENS - 1):
        keys = torch.zeros(BATCH, HEADS, TOKENS, dtype=torch.bool)
        keys[..., : position + 1] = True
        if geometry is not None and position >= FIRST:
            ids = runtime_selection(q, k, cis, position, geometry)
            inside = (torch.arange(TOKENS) // geometry.block_size == ids[..., None]).any(2)
            assert not inside[..., : position + 1].all()
            keys &= inside
        for h in range(HEADS * GROUP):
            kv = h // GROUP
            logits = (q[:, h, position, None] * k[:, kv]).sum(-1).double() * SCALE + cis[:, kv]
            weights = (logits.exp() * keys[:, kv]).double()
            want = (weights[..., None] * v[:, kv]).sum(1) / weights.sum(1, keepdim=True)
            torch.testing.assert_close(got[:, position, h].double(), want, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_importance_head_through_the_bias(tensors):
    q, k, v, head = tensors
    layer = torch.nn.Module()
    layer.importance = head
    native = Pass(context_tokens=FIRST, geometry=SMALL)
    out, _ = native_attention(layer, q, k, v, None, scaling=SCALE, native=native)
    out.square().sum().backward()
    assert head.A.grad.abs().min() > 0 and head.delta.weight.grad.abs().max() > 0


def best_share(logits, unit=1):
    """The share of the first of two open blocks that aligns best with dense attention `logits` [G, 8], and its loss."""
    geometry = Geometry(block_size=2, unit=unit, budget=4, sink=1, recent=1, agnostic=1)
    seen = torch.ones(1, 8, dtype=torch.bool)

    def loss(share):
        scores = torch.tensor([9.0, share, 1 - share, 9.0]).view(1, 1, 1, 4)
        return float(alignment(logits.view(1, 1, -1, 1, 8), seen, scores, 7, geometry))

    return min((loss(s / 100), s / 100) for s in range(1, 100))


def test_alignment_is_smallest_where_the_scores_are_the_squared_shares_of_attention():
    """Two blocks are open to choice, with 0.3 and 0.1 of the attention; what the sink gets does not count."""
    mass = torch.tensor([0.4, 0.1, 0.2, 0.1, 0.05, 0.05, 0.1, 1e-30])
    loss, share = best_share(mass.log())
    assert share == 0.9
    entropy = -(0.9 * torch.tensor(0.9).log() + 0.1 * torch.tensor(0.1).log())
    assert loss == pytest.approx(0.1 * float(entropy), rel=1e-4)


def test_a_diffuse_head_has_little_say_in_the_alignment():
    peaked = torch.tensor([-40.0, -40, -40, -40, 0, -40, -40, -40])
    _, share = best_share(torch.stack((peaked, torch.zeros(8), torch.zeros(8))))
    assert share < 0.15


def test_the_power_of_the_alignment_keeps_the_order():
    mass = torch.tensor([0.4, 0.1, 0.2, 0.1, 0.05, 0.05, 0.1, 1e-30])
    _, share = best_share(mass.log(), unit=2)  # a power of two: shares 3 to 1 do what 9 to 1 did
    assert share == 0.75


def test_rows_that_only_rank_are_dense(tensors):
    q, k, v, head = tensors
    layer = torch.nn.Module()
    layer.importance = head
    passes = [
        Pass(context_tokens=FIRST, geometry=SMALL, sparse=False, align=True),
        Pass(context_tokens=FIRST, geometry=None),
    ]
    ranked, dense = (native_attention(layer, q, k, v, None, scaling=SCALE, native=p)[0] for p in passes)
    assert torch.equal(ranked, dense) and len(passes[0].losses) == 1 and not passes[1].losses


def test_a_head_begins_by_looking_at_the_previous_token():
    model = train_native.build_model(train_native.TINY, seed=0)
    ids = torch.randint(1, len(recall.VOCABULARY), (1, 300), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions[0][0, 0]
    assert weights.diagonal(-1).mean() > 0.95


def trainer_of(tmp_path, *argv):
    return train_native.Trainer(train_native.parse(["--tiny", "--out", str(tmp_path), *argv]))


def stages_by_the_clock(trainer, right=0.0):
    """Return (percent of the time, stage, whether selection has joined) at every move."""
    moves = []
    for percent in range(101):
        before = trainer.stage, trainer.selecting
        trainer._advance(percent / 100, right, trainer.recipe.lengths[trainer.stage], sparse=percent % 2 == 0)
        if (trainer.stage, trainer.selecting) != before:
            moves.append((percent, trainer.stage, trainer.selecting))
    return moves


def test_no_length_outlasts_its_share_of_the_time(tmp_path):
    """Nothing is ever learnt, in dense steps or sparse ones: the clock alone moves on, at the end of every share."""
    assert stages_by_the_clock(trainer_of(tmp_path, "--dense")) == [(41, 1, False), (62, 2, False)]


def test_selection_joins_at_the_end_of_the_dense_share(tmp_path):
    """Lengths of less than twice the budget (128 tokens here) are left to the dense phase."""
    moves = stages_by_the_clock(trainer_of(tmp_path, "--dense-share", "0.5"))
    assert moves == [(21, 1, False), (32, 2, False), (51, 2, True)]


def test_selection_joins_early_where_the_task_is_learnt(tmp_path):
    trainer = trainer_of(tmp_path)
    for _ in range(75):
        trainer._advance(0.0, 1.0, trainer.recipe.lengths[trainer.stage], sparse=False)
    assert trainer.selecting


@pytest.mark.parametrize("sparse", [False, True])
def test_a_length_that_is_learnt_makes_room_for_the_next(tmp_path, sparse):
    """Only sparse steps tell what is learnt once selection has joined."""
    trainer = trainer_of(tmp_path)
    trainer.recipe, trainer.stage, trainer.selecting = replace(trainer.recipe, geometry=SMALL), 1, sparse
    assert trainer.recipe.first_sparse == 1
    for _ in range(25):
        trainer._advance(0.0, 1.0, trainer.recipe.lengths[1], sparse)
    assert trainer.stage == 2 and trainer.recent == trainer.found == 0
    assert trainer_of(tmp_path, "--from-length", "512").stage == 2


def test_a_block_size_keeps_the_budget():
    geometry = train_native.geometry_of(16, 512)
    assert (geometry.budget, geometry.unit, geometry.agnostic, geometry.query) == (32, 4, 6, 23)
    assert geometry.tokens == Geometry().tokens == 512


def test_a_tiny_run_lowers_the_loss_and_leaves_a_loadable_model(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    argv = ["--tiny", "--minutes", "0.0001", "--out", str(tmp_path)]
    args = train_native.parse(argv)
    trainer = train_native.Trainer(args)
    trainer.step = train_native.WARMUP_STEPS
    losses = [float(trainer.train_step(0.0)[0]) for _ in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    trainer.save()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    own = trainer.model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.float(), own[name].cpu(), rtol=1e-2, atol=1e-6)
    assert tokenizer("[ n1 v2 ]")["input_ids"] == [2, recall.NAME0 + 1, recall.VALUE0 + 2, 3]
    heads = read_heads(tmp_path / "heads.safetensors")
    assert heads.info is not None and (heads.info.method, heads.info.num_layers) == ("nosa", 2)
    found = bias_heads(heads, layer_specs(model.config), model_type="llama")
    for i, head in found.items():
        v = torch.randn(1, 2, 5, 32)
        trained = trainer.model.model.layers[i].self_attn.importance
        torch.testing.assert_close(head(v), trained(v.to(trainer.device)).cpu())
    results = trainer.results()
    assert set(results["accuracy"]) == {"dense", "infllm_v2", "nosa"}
    assert json.loads(json.dumps(results)) == results
    named = {"block_size": 16, "budget_tokens": 128, "window_stride": 4, "sink_blocks": 1, "recent_blocks": 2}
    assert results.items() >= (named | {"query_agnostic_blocks": 2, "query_agnostic_share": 0.4}).items()
    again = train_native.Trainer(train_native.parse([*argv, "--resume", str(tmp_path / "weights.pt")]))
    rounded = train_native.Trainer(
        train_native.parse([*argv, "--resume", str(tmp_path / "model.safetensors")])
    )
    assert torch.equal(rounded.model.lm_head.weight, trainer.model.lm_head.weight.bfloat16().float())
    assert all(
        torch.equal(a, b) for a, b in zip(own.values(), again.model.state_dict().values(), strict=True)
    )


def test_full_budget_equals_dense_in_training(tensors):
    q, k, v, head = tensors
    layer = torch.nn.Module()
    layer.importance = head
    everything = Geometry(block_size=16, unit=4, budget=13, sink=1, recent=2, agnostic=2)
    outs = [
        native_attention(
            layer, q, k, v, None, scaling=SCALE, native=Pass(context_tokens=FIRST, geometry=geometry)
        )[0]
        for geometry in (everything, None)
    ]
    assert torch.equal(*outs)


def test_weights_that_are_not_there_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_native.parse(["--out", str(tmp_path), "--resume", str(tmp_path / "nowhere.pt")])
    assert "there is no file" in capsys.readouterr().err
