"""Loading says what it did and, when it cannot, what is missing and how to provide it."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rheo_offload.errors import RheoError
from rheo_offload.model import loader
from rheo_offload.model.gguf_tokenizer import load_gguf_tokenizer
from rheo_offload.model.loader import load, prepare_packaged_model, resolve_device, resolve_dtype
from tests.helpers.spm import TOKENS, write_gguf

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test asks the hub for anything, with or without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def gguf_dir(tmp_path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path


@pytest.fixture
def model_dir(tmp_path, gguf_dir) -> Path:
    """A directory as `save_pretrained` leaves it, with float32 weights."""
    directory = tmp_path / "saved"
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    load_gguf_tokenizer(gguf_dir / "tiny.gguf").save_pretrained(directory)
    return directory


def test_a_directory(model_dir):
    model, tokenizer = load(str(model_dir), device="cpu")
    assert not model.training and model.dtype == torch.float32 and model.device == CPU
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id


def test_the_dtype_that_was_asked_for(model_dir):
    model, _ = load(str(model_dir), dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_gguf_file(gguf_dir):
    model, tokenizer = load(str(gguf_dir), gguf="tiny.gguf", device="cpu")
    from gguf import GGUFReader

    stored = {t.name: t.data for t in GGUFReader(str(gguf_dir / "tiny.gguf")).tensors}
    weights = model.state_dict()
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
    }.items():
        assert torch.equal(weights[ours], torch.tensor(stored[theirs]))
    assert tokenizer.tokenize("hello world") == ["hell", "o▁", "wor", "ld"]
    assert torch.isfinite(model(**tokenizer("hello world", return_tensors="pt")).logits).all()


def test_auto_is_float32_on_the_cpu_and_bfloat16_on_cuda():
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", ["fp32", "float64", ""])
def test_unknown_dtype(dtype):
    with pytest.raises(RheoError, match="float32, bfloat16, float16"):
        resolve_dtype(dtype, CPU)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RheoError, match="no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(RheoError, match="unknown device"):
        resolve_device("quantum")


def test_missing_directory():
    with pytest.raises(RheoError, match="there is no model directory"):
        load("./nowhere", device="cpu")


def test_no_network():
    with pytest.raises(
        RheoError, match=r"could not fetch the model of 'someone/something'.*local model directory"
    ):
        load("someone/something", device="cpu")


def test_directory_without_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RheoError, match="could not load the model from the directory"):
        load(str(tmp_path), device="cpu")


def test_directory_without_tokenizer(model_dir):
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(RheoError, match="could not load the tokenizer from the directory"):
        load(str(model_dir), device="cpu")


def test_gguf_file_that_is_not_there(tmp_path):
    with pytest.raises(RheoError, match="no GGUF file"):
        load(str(tmp_path), gguf="missing.gguf", device="cpu")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_extra_missing(gguf_dir, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RheoError, match=r"rheo-offload\[gguf\]"):
        load(str(gguf_dir), gguf="tiny.gguf", device="cpu")


def test_packaged_model_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, loader._PACKAGE, None)
    with pytest.raises(RheoError, match=r"rheo-offload\[demo\].*local model directory"):
        load("gemma3-270m", device="cpu", models_dir=tmp_path)


class FakePackage:
    """Stands for the Gemma packages; its model is the tiny GGUF."""

    MODEL_NAME = "tiny.gguf"

    def __init__(self, root: Path, *, damaged: bool = False) -> None:
        (root / "data").mkdir(parents=True)
        for name in ("GEMMA_TERMS.html", "NOTICE.md"):
            (root / "data" / name).write_text("terms")
        self.__file__ = str(root / "__init__.py")
        self.damaged, self.assembled = damaged, 0

    def verify_chunks(self) -> None: ...

    def assemble(self, path: Path, overwrite: bool) -> Path:
        path.parent.mkdir(parents=True)
        self.assembled += 1
        if self.damaged:
            path.write_bytes(b"half a model")
            raise ValueError("sha256 did not match")
        return write_gguf(path)


def test_packaged_model_is_converted_once(tmp_path, monkeypatch):
    package = FakePackage(tmp_path / "package")
    monkeypatch.setitem(sys.modules, loader._PACKAGE, package)
    first, tokenizer = load("gemma3-270m", device="cpu", models_dir=tmp_path / "models")
    second, again = load("gemma3-270m", device="cpu", models_dir=tmp_path / "models")
    assert package.assembled == 1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert tokenizer("hello world")["input_ids"] == again("hello world")["input_ids"]
    home = tmp_path / "models" / "gemma3-270m"
    assert (home / "GEMMA_TERMS.html").is_file()
    assert [p.name for p in home.parent.iterdir()] == ["gemma3-270m"], "something was left behind"


def test_damaged_package_leaves_nothing_behind(tmp_path, monkeypatch):
    package = FakePackage(tmp_path / "package", damaged=True)
    monkeypatch.setitem(sys.modules, loader._PACKAGE, package)
    with pytest.raises(RheoError, match="install them again"):
        prepare_packaged_model(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_model_of_a_demo_that_names_none(tmp_path, monkeypatch):
    """Gemma where it can be had, packaged or converted before, else the one that is always there."""
    monkeypatch.setitem(sys.modules, loader._PACKAGE, FakePackage(tmp_path / "package"))
    assert loader.default_model(tmp_path) == "gemma3-270m"
    with monkeypatch.context() as bare:
        bare.setitem(sys.modules, "gguf", None)
        assert loader.default_model(tmp_path) == "native", "the packages alone cannot be read"
    monkeypatch.setitem(sys.modules, loader._PACKAGE, None)
    assert loader.default_model(tmp_path) == "native"
    (tmp_path / "gemma3-270m").mkdir()
    (tmp_path / "gemma3-270m" / "config.json").write_text("{}")
    assert loader.default_model(tmp_path) == "gemma3-270m"
