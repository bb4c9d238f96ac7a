"""A model directory that brings its own `rheo.yaml` and heads, and the name of the one in the package."""

from argparse import Namespace

import pytest
import torch

from bench import train_native
from rheo_offload import RheoConfig, offload
from rheo_offload.cli.options import config_from
from rheo_offload.errors import RheoError
from rheo_offload.eval.recall import ask, draw_sequence
from rheo_offload.model import loader
from tests.helpers.homes import DEVICE

YAML = """
cache: {block_size: 16, device_memory: floor}
selection:
  method: nosa
  token_budget: 128
  recent_blocks: 2
  query_agnostic_share: 0.4
  params: {weights: heads.safetensors, window_stride: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the trainer leaves behind, untrained, with the configuration that serves it."""
    out = tmp_path_factory.mktemp("native")
    trainer = train_native.Trainer(train_native.parse(["--tiny", "--out", str(out)]))
    trainer.save()
    (out / "rheo.yaml").write_text(YAML)
    return out


def test_the_folder_serves_itself(folder, monkeypatch):
    """By its name, from any working directory: weights, tokenizer, heads and geometry; blocks really move."""
    monkeypatch.setattr(loader, "NATIVE_DIR", folder)
    model, tokenizer = loader.load("native", device="cpu")
    config = loader.own_config("native")
    assert config.selection.params["weights"] == str(folder / "heads.safetensors")
    offload(model, config)
    ids = torch.randint(5, len(tokenizer), (1, 400), generator=torch.Generator().manual_seed(0))
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, eos_token_id=None, pad_token_id=0
    )
    stats = model.rheo.stats()
    assert stats.block_budget == 8 and stats.evicted_blocks > 0 and stats.miss_blocks > 0


def test_models_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "NATIVE_DIR", tmp_path / "nowhere")
    assert loader.own_config(str(tmp_path)) is None and loader.own_config("gemma3-270m") is None
    with pytest.raises(RheoError, match="not part of this installation"):
        loader.load("native", device="cpu")


@pytest.mark.parametrize(("chosen", "method"), [(None, "nosa"), ("default", "mean_key")])
def test_the_command_line_takes_a_models_own_configuration_unless_told_otherwise(chosen, method):
    args = Namespace(model="native", config=chosen, overrides=["cache.capacity_ratio=2"])
    config = config_from(args)
    assert (config.selection.method, config.cache.capacity_ratio) == (method, 2)
    assert config_from(Namespace(model="gemma3-270m", config=None, overrides=[])) == RheoConfig()


def right_answers(model, tokens, prompts, seed=7_000_000):
    """Return which questions of unseen prompts the offloaded model answers exactly."""
    right = []
    for i in range(prompts):
        layout, ids = draw_sequence(tokens, 320, seed + i)
        for question, answer in ask(model, ids, layout):
            right.append(answer == ids[0, question.start + 1 : question.end + 1].tolist())
    return right


@pytest.mark.parametrize("tokens", [2048, 8192])
def test_the_packaged_model_recalls_through_the_decode_path(tokens):
    """512 tokens of up to 8192 attended, blocks evicted and loaded again, questions it has never seen."""
    model, _ = loader.load("native", dtype="float32", device=DEVICE)
    config = loader.own_config("native").with_overrides(["cache.device_memory=floor"])
    offload(model, config)
    right = right_answers(model, tokens, prompts=2)
    stats = model.rheo.stats()
    assert stats.block_budget * config.cache.block_size == 512
    assert stats.evicted_blocks > 0 and stats.miss_blocks > 0
    assert len(right) > 30 and sum(right) >= 0.95 * len(right)


def test_the_packaged_model_without_its_geometry_does_not():
    """Sink and recent blocks alone answer next to nothing: the choice of blocks is what counts."""
    model, _ = loader.load("native", dtype="float32", device=DEVICE)
    offload(
        model,
        RheoConfig().with_overrides(
            ["selection.method=streaming", "selection.token_budget=512", "cache.device_memory=floor"]
        ),
    )
    right = right_answers(model, 2048, prompts=1)
    assert sum(right) < 0.5 * len(right)


@pytest.mark.gpu
def test_the_packaged_model_recalls_8192_tokens_at_the_promised_rate():
    """Captured steps, 24 prompts: at least 98 % of the answers exact."""
    model, _ = loader.load("native", dtype="float32", device="cuda")
    offload(model, loader.own_config("native").with_overrides(["cache.device_memory=floor"]))
    right = right_answers(model, 8192, prompts=24)
    assert len(right) > 500 and sum(right) >= 0.98 * len(right), (sum(right), len(right))
    assert model.rheo.stats().evicted_blocks > 0
