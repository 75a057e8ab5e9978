"""Texts of token ids, out of a tokenizer.json of this machine: nothing is downloaded, no code of a model runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from grape_service.models.files import HUB_ID
from grape_service.models.vocabulary import Vocabulary

MAX_BYTES = 256 * 2**20


class TokenizerFile:
    """What `Vocabulary` reads of a fast tokenizer, without transformers."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_file(str(path))
        self.added_tokens_decoder: dict[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        self.special_tokens_map: dict[str, str] = {}


def vocabulary_of(target: Any) -> Vocabulary | None:
    """The vocabulary of a config's target; None where its tokenizer.json is not on this machine or cannot be read."""
    path = _tokenizer_file(target) if isinstance(target, dict) else None
    if path is None:
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        return Vocabulary(TokenizerFile(path))
    except Exception:  # the tokenizers library raises bare Exceptions
        return None


def _tokenizer_file(target: dict[str, Any]) -> Path | None:
    model, revision = target.get("model"), target.get("revision")
    if not isinstance(model, str) or not model or "://" in model or "\0" in model:
        return None
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        path = folder / "tokenizer.json"
        return path if path.is_file() else None
    if not HUB_ID.fullmatch(model):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "tokenizer.json", revision=revision if isinstance(revision, str) else None)
    return Path(cached) if isinstance(cached, str) else None
