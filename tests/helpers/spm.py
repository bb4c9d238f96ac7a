"""SentencePiece BPE written out, and a tiny GGUF file, to test what is built from a GGUF vocabulary."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

# an extra of the package: modules that import this helper are skipped without it
GGUFWriter = pytest.importorskip("gguf", reason="needs the [gguf] extra").GGUFWriter

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

TOKENS = [
    ("<pad>", CONTROL),
    ("</s>", CONTROL),
    ("<s>", CONTROL),
    ("<unk>", UNKNOWN),
    ("\n\n", USER_DEFINED),
    ("\n", USER_DEFINED),
    ("  ", USER_DEFINED),
    ("<b>", USER_DEFINED),
    *((f"<0x{byte:02X}>", BYTE) for byte in range(256)),
    *(
        (token, NORMAL)
        for token in ("he", "ll", "hell", "lo", "o" + SPACE, "hello", SPACE + "w", "or", "wor")
    ),
    *((token, NORMAL) for token in (SPACE + "wor", "ld", SPACE + "world", "rl", "ell", "ow", SPACE + "h")),
    *((token, NORMAL) for token in ("h", "e", "l", "o", SPACE, "w", "r", "d", "ö")),
]


def spm_encode(text: str, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[int]:
    """Cut out user-defined symbols, longest first; then join the best-scored pair, leftmost first."""
    ids = {token: i for i, token in enumerate(tokens)}
    symbols = sorted(
        (t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED), key=len, reverse=True
    )
    normal = {t: scores[i] for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
    out: list[int] = []
    piece: list[str] = []

    def flush() -> None:
        while True:
            pairs = [
                (normal[a + b], -i)
                for i, (a, b) in enumerate(zip(piece, piece[1:], strict=False))
                if a + b in normal
            ]
            if not pairs:
                break
            at = -max(pairs)[1]
            piece[at : at + 2] = [piece[at] + piece[at + 1]]
        for part in piece:
            out.extend([ids[part]] if part in normal else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
        piece.clear()

    at = 0
    while at < len(text):
        symbol = next((s for s in symbols if text.startswith(s, at)), None)
        if symbol is None:
            piece.append(text[at].replace(" ", SPACE))
            at += 1
        else:
            flush()
            out.append(ids[symbol])
            at += len(symbol)
    flush()
    return out


def write_gguf(
    path: Path, *, add_space_prefix: bool | None = False, tokenizer: str = "llama", seed: int = 0
) -> Path:
    """Write a two-layer Llama with random fp32 weights and the vocabulary above."""
    writer = GGUFWriter(path, "llama")
    rng = np.random.default_rng(seed)
    dim, heads, kv_heads, hidden = 16, 2, 1, 32
    writer.add_context_length(128)
    writer.add_embedding_length(dim)
    writer.add_block_count(2)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list([token for token, _ in TOKENS])
    writer.add_token_types([kind for _, kind in TOKENS])
    writer.add_token_scores(scores())
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    if add_space_prefix is not None:
        writer.add_add_space_prefix(add_space_prefix)

    def weight(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))

    weight("token_embd", len(TOKENS), dim)
    weight("output", len(TOKENS), dim)
    weight("output_norm", dim)
    for layer in range(2):
        block = f"blk.{layer}"
        weight(f"{block}.attn_norm", dim)
        weight(f"{block}.ffn_norm", dim)
        weight(f"{block}.attn_q", dim, dim)
        weight(f"{block}.attn_k", dim // heads * kv_heads, dim)
        weight(f"{block}.attn_v", dim // heads * kv_heads, dim)
        weight(f"{block}.attn_output", dim, dim)
        weight(f"{block}.ffn_gate", hidden, dim)
        weight(f"{block}.ffn_up", hidden, dim)
        weight(f"{block}.ffn_down", dim, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def scores() -> list[float]:
    """Scores as SentencePiece BPE writes them: the rank of a normal token, negated; others far below."""
    first = next(i for i, (_, kind) in enumerate(TOKENS) if kind == NORMAL)
    return [float(first - i) if kind == NORMAL else -1000.0 for i, (_, kind) in enumerate(TOKENS)]
