"""`selection.remainder: centroid` through `generate` on tiny models: exact at full budget, the reference below."""

import pytest
import torch

from csrc_free_kernels.reference.attend_centroids import attend_centroids
from rheo_offload import ConfigError, RheoConfig, offload, restore
from rheo_offload.execution import decode
from rheo_offload.execution.dense_rounds import attend_everything
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.model.test_families import batch, drop_before_every_step
from tests.test_end_to_end import BLOCK, greedy, prompt, sparse_config

KEEP_MEANS = [("mean_key", {}), ("infllm_v2", {}), ("moba", {}), ("arkvale", {"digest": "centroid"})]


def config(method="mean_key", budget_blocks=6, params=None, **groups):
    selection = {"remainder": "centroid", "params": params or {}} | groups.pop("selection", {})
    return sparse_config(method, budget_blocks, selection=selection, **groups)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_full_budget_equals_stock(family):
    """Nothing is left out: soft caps, sinks, a ragged batch, and blocks dropped before every step."""
    model = tiny_model(family, device=DEVICE)
    ids, mask = batch((120, 37, 7))
    expected = greedy(model, ids, attention_mask=mask)
    offload(model, config(budget_blocks=16))
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    hook.remove()


@pytest.mark.parametrize(("method", "params"), KEEP_MEANS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_step_is_selected_keys_plus_means(family, method, params, monkeypatch):
    """Each layer's output is softmax over the selected keys and the means that the host store itself gives."""
    model = tiny_model(family, device=DEVICE)
    offload(model, config(method, params=params, audit={"every": 1}))
    checked, attend = [], decode._audit

    def compare(ex, layer, call, lse, out):
        ws, kv, q = ex.workspace_of(layer), ex.cache, call.q[:, :, 0]
        table = kv.host_table.long().clamp(min=0).cpu()
        units = layer.summary_width
        means = [
            host.cpu()[table].transpose(1, 2).unflatten(3, (units, -1)).mean(4)  # [B, Hkv, N, W, D]
            for host in (layer.k_host, layer.v_host)
        ]
        pages = torch.arange(table.numel(), dtype=torch.int32).view(table.shape)
        by_page = [m.transpose(1, 2).flatten(0, 1) for m in means]
        exact = [torch.zeros_like(t[:1]).cpu() for t in ws.estimated]
        attend_centroids(
            q.cpu(), *by_page, pages, kv.step_lens.cpu(), ws.selected_blocks.cpu(), *exact,
            softmax_scale=call.softmax_scale, soft_cap=call.soft_cap, block_size=BLOCK,
        )  # fmt: skip
        got = torch.logsumexp(ws.estimated[1], 0).cpu()
        torch.testing.assert_close(got, exact[1][0], atol=1e-4, rtol=1e-4)
        weights = torch.softmax(ws.estimated[1].cpu(), 0)[..., None]
        torch.testing.assert_close(
            (weights * ws.estimated[0].cpu()).sum(0), exact[0][0], atol=1e-4, rtol=1e-4
        )
        attended, lse_all = attend_everything(ex, layer, call, slice(0, kv.rows), purpose="audited")
        assert (lse <= lse_all + 1e-5).all() and not torch.equal(attended, out)
        checked.append(layer.spec.layer_idx)
        attend(ex, layer, call, lse, out)

    monkeypatch.setattr(decode, "_audit", compare)
    ids = prompt(230, rows=2)
    out = greedy(model, ids, new=12)
    assert len(checked) >= 12
    stats = model.rheo.stats()
    assert stats.miss_blocks > 0 and stats.evicted_blocks > 0
    assert 0 < stats.captured_mass_mean < 1 and stats.output_error_mean > 0
    hook = drop_before_every_step(model)
    assert torch.equal(greedy(model, ids, new=12), out), "what happens to be resident does not matter"
    hook.remove()


def test_the_audit_leaves_the_estimate_out():
    """The captured mass is that of the keys that were attended to, with and without the estimate."""
    masses = []
    for remainder in ("none", "centroid"):
        model = tiny_model("llama", device=DEVICE)
        offload(model, config(selection={"remainder": remainder}, audit={"every": 1}))
        # one step, fed by hand: later ones would see other hidden states
        greedy(model, prompt(), new=2)
        executor = model.rheo._last.executor
        masses.append(executor.audit.per_layer()[0])
        restore(model)
    none, centroid = masses
    assert none.captured_mass_mean == pytest.approx(centroid.captured_mass_mean, rel=1e-4)
    assert none.captured_mass_min == pytest.approx(centroid.captured_mass_min, rel=1e-4)
    assert none.output_error_mean != centroid.output_error_mean, "the output is another one"


def test_means_follow_crops_copies_and_growth():
    """Beams (reorder), prompt lookup (crop) and a cache that grows, at full budget: equal to stock."""
    model = tiny_model("llama", device=DEVICE)
    ids, mask = batch((70, 33))
    options = dict(max_new_tokens=20, num_beams=3, do_sample=False, attention_mask=mask)
    beams, lookup = model.generate(ids, **options), greedy(model, prompt(20).repeat(1, 5))
    offload(model, config(budget_blocks=16))
    assert torch.equal(model.generate(ids, **options), beams)
    assert torch.equal(greedy(model, prompt(20).repeat(1, 5), prompt_lookup_num_tokens=4), lookup)
    restore(model)
    offload(model, config())
    expected = greedy(model, prompt())
    cache = model.rheo.new_cache(max_length=32)
    assert torch.equal(greedy(model, prompt(), past_key_values=cache), expected)
    sparse = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), sparse)


def test_dense_layers_estimate_nothing():
    model = tiny_model("llama", device=DEVICE)
    ids = prompt()
    expected = greedy(model, ids)
    offload(model, config(selection={"dense_layers": [0, 1]}))
    assert torch.equal(greedy(model, ids), expected)
    layers = model.rheo._last.executor.cache.full.values()
    assert all(layer.value_summary is None for layer in layers)


@pytest.mark.parametrize("method", ["quest", "lserve", "streaming", "full", "arkvale"])
def test_methods_without_mean_keys_are_refused(method):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=f"needs the mean keys.*{method}.*remainder none"):
        offload(model, RheoConfig.from_dict({"selection": {"method": method, "remainder": "centroid"}}))
    assert not hasattr(model, "rheo")


def test_the_plan_counts_the_mean_values(tmp_path, capsys):
    import json

    from rheo_offload.cli.main import main

    tiny_model("llama").config.save_pretrained(tmp_path)
    args = ["plan", "--model", str(tmp_path), "--context", "4096", "--json", "cache.host_memory=8GiB"]
    found = []
    for remainder in ("none", "centroid"):
        assert main([*args, f"selection.remainder={remainder}"]) == 0
        found.append(json.loads(capsys.readouterr().out)["summary_bytes"])
    assert found[1] == 2 * found[0] > 0


@pytest.mark.gpu
def test_gpu_equals_cpu():
    tokens = []
    for device in ("cuda", "cpu"):
        model = offload(tiny_model("gemma3", device=device), config())
        ids = prompt(rows=2).to(device)
        tokens.append(greedy(model, ids, new=32).cpu())
    assert torch.equal(*tokens)
