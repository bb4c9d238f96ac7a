"""A tiny random model in a directory, with a tokenizer that spells most characters out as bytes."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rheo_offload.model.gguf_tokenizer import load_gguf_tokenizer
from tests.helpers.spm import TOKENS, write_gguf

POSITIONS = 2048


def save_spelling_model(directory: Path) -> Path:
    """Save a random two-layer Llama of 2048 positions and its tokenizer; return the directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=POSITIONS,
        bos_token_id=2,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.6,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    load_gguf_tokenizer(write_gguf(directory / "tiny.gguf")).save_pretrained(directory)
    (directory / "tiny.gguf").unlink()
    return directory
