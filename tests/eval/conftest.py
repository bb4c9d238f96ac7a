"""A tiny random model with its own tokenizer, and the text that prompts are filled with."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rheo_offload.eval.prompts import Source
from rheo_offload.eval.texts import prose_paragraphs
from tests.helpers.spelling_model import save_spelling_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return save_spelling_model(tmp_path_factory.mktemp("spelling"))


@pytest.fixture(scope="session")
def source(model_dir):
    return Source(AutoTokenizer.from_pretrained(model_dir), prose_paragraphs())


@pytest.fixture
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()
