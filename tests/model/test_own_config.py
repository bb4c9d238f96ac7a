"""A model directory that brings its own `rheo.yaml` and heads, and the name of the one in the package."""

import pytest
import torch

from bench import train_native
from rheo_offload import offload
from rheo_offload.errors import RheoError
from rheo_offload.model import loader

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
