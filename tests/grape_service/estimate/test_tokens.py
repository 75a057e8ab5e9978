"""What `check` says of the tokens of a pool's first rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.estimate.tokens import look_at_tokens
from grape_service.render.loading import load_renderer
from grape_service.rows.candidate import Candidate
from tests import tiny_models


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", None])
def test_a_tokenizer_class_that_splits_words_its_own_way_is_named(tmp_path: Path, tokenizer_class: str | None) -> None:
    tiny_models.make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    if tokenizer_class:
        settings = json.loads(path.read_text())
        settings.pop("backend", None)
        path.write_text(json.dumps({**settings, "tokenizer_class": tokenizer_class}))
    renderer = load_renderer(str(tmp_path), PolicyConfig(model=str(tmp_path)), RenderConfig())
    assert type(renderer.tokenizer).__name__ == (tokenizer_class or "TokenizersBackend")
    prompt = [{"role": "user", "content": "Say twelve."}]
    candidates = [Candidate(prompt, f"We'll say {n}2345\n\n x= y", f"p{n}", f"c{n}") for n in range(3)]
    status, said = look_at_tokens(renderer, candidates, renderer.render(candidates), str(tmp_path))
    if tokenizer_class:
        assert status == "warning"
        assert re.search(
            r"Qwen2Tokenizer splits [1-3] of 6 texts of the sample otherwise than .*\"We'll say \d2345", said
        )
    else:
        assert "splits" not in said
