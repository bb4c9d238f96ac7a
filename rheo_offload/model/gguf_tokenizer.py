"""The tokenizer of a GGUF file whose vocabulary is SentencePiece BPE (`tokenizer.ggml.model` = `llama`).

Such a file holds tokens and scores but no merges. SentencePiece BPE joins, again and again, the adjacent
pair whose concatenation is the token of the highest score. So every split of a token into two tokens is a
merge, and its rank is the rank of the token it makes. transformers 5.17 reads the scores as unigram
probabilities, which cuts text into about twice the tokens that Gemma was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rheo_offload.errors import RheoError

__all__ = ["SpmVocabulary", "build_tokenizer", "load_gguf_tokenizer", "read_vocabulary"]

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class SpmVocabulary:
    """What a GGUF file says about its tokenizer; the index of a token is its id."""

    tokens: Sequence[str]
    scores: Sequence[float]
    token_types: Sequence[int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool = True
    add_space_prefix: bool = True
    context_length: int | None = None


def read_vocabulary(path: Path) -> SpmVocabulary | None:
    """Read the vocabulary of a GGUF file.

    Returns:
        The vocabulary, or None when the file's tokenizer is not SentencePiece BPE.

    Raises:
        RheoError: the `gguf` package is missing, or the file holds no vocabulary.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise RheoError(
            "reading a GGUF file needs the gguf package: pip install 'rheo-offload[gguf]'"
        ) from error
    reader = GGUFReader(str(path))

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(name)
        return default if found is None else found.contents()

    if field("tokenizer.ggml.tokens") is None:
        raise RheoError(f"{path} holds no tokenizer")
    if field("tokenizer.ggml.model") != "llama" or field("tokenizer.ggml.scores") is None:
        return None
    architecture = field("general.architecture", "")
    return SpmVocabulary(
        tokens=field("tokenizer.ggml.tokens"),
        scores=field("tokenizer.ggml.scores"),
        token_types=field("tokenizer.ggml.token_type"),
        bos_id=field("tokenizer.ggml.bos_token_id"),
        eos_id=field("tokenizer.ggml.eos_token_id"),
        unk_id=field("tokenizer.ggml.unknown_token_id"),
        pad_id=field("tokenizer.ggml.padding_token_id"),
        add_bos=field("tokenizer.ggml.add_bos_token", True),
        add_space_prefix=field("tokenizer.ggml.add_space_prefix", True),
        context_length=field(f"{architecture}.context_length"),
    )


def _merges(vocabulary: SpmVocabulary) -> list[tuple[str, str]]:
    """Every split of a normal token into two normal tokens; the token of the highest score first.

    Tokens of equal score keep the order of their ids. Splits of one token share its score; SentencePiece
    would take the leftmost pair in the text, which a rank cannot know: the shorter left half goes first.
    """
    normal = [i for i, kind in enumerate(vocabulary.token_types) if kind == NORMAL]
    known = {vocabulary.tokens[i] for i in normal}
    normal.sort(key=lambda i: (-vocabulary.scores[i], i))
    return [
        (token[:cut], token[cut:])
        for token in (vocabulary.tokens[i] for i in normal)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _backend(vocabulary: SpmVocabulary) -> Tokenizer:
    tokens = vocabulary.tokens
    unk = None if vocabulary.unk_id is None else tokens[vocabulary.unk_id]
    backend = Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges(vocabulary),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=BYTE in vocabulary.token_types,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    restore = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        backend.decoder = decoders.Sequence([*restore, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = replace
        backend.decoder = decoders.Sequence(restore)
    # Added tokens are cut out of the raw text, longest first, before any merge: SentencePiece treats its
    # user-defined symbols (runs of spaces and newlines, markup) the same way.
    kinds = vocabulary.token_types
    backend.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, kinds, strict=True)
            if kind == USER_DEFINED
        ]
    )
    backend.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, kinds, strict=True)
            if kind in (UNKNOWN, CONTROL)
        ]
    )
    if vocabulary.add_bos and vocabulary.bos_id is not None:
        bos = tokens[vocabulary.bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary.bos_id)]
        )
    return backend


def build_tokenizer(vocabulary: SpmVocabulary) -> PreTrainedTokenizerBase:
    """Build the tokenizer: BPE with byte fallback, BOS in front by default, left padding.

    Raises:
        RheoError: the vocabulary names a token twice, so ids would be lost.
    """
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):
        raise RheoError("the GGUF vocabulary holds the same token twice")
    ids = {
        "bos": vocabulary.bos_id,
        "eos": vocabulary.eos_id,
        "unk": vocabulary.unk_id,
        "pad": vocabulary.pad_id,
    }
    named = {f"{name}_token": vocabulary.tokens[i] for name, i in ids.items() if i is not None}
    length = {} if vocabulary.context_length is None else {"model_max_length": vocabulary.context_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(vocabulary),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **named,
        **length,
    )


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """Build the tokenizer of a GGUF file; None when its vocabulary is not SentencePiece BPE."""
    vocabulary = read_vocabulary(path)
    return None if vocabulary is None else build_tokenizer(vocabulary)
