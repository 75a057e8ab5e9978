"""Tokenizers of every family."""

import pytest
from transformers import AutoTokenizer

from tests import tiny_models


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {}
    for name in [*tiny_models.TEMPLATES, None]:
        folder = tmp_path_factory.mktemp(f"tokenizer-{name}")
        tiny_models.make_tokenizer(folder, name)
        found[name] = AutoTokenizer.from_pretrained(str(folder))
    return found
