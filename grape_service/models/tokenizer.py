"""What rendering needs of a model folder: the tokenizer, the longest sequence, the tokens it stops at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.keys import NOT_READ, files_of_key
from grape_service.models.digests import stamp_of
from grape_service.models.files import file_names

TEMPLATE_FILE = "chat_template.jinja"
LARGEST_LIMIT = 100_000_000
"""Configs write numbers above this for 'no limit'."""
TAIL_TOKENS = 8
"""Of a text, those that decide how what follows it decodes."""


def folder_stamp(folder: str) -> str:
    """Changes when a file of the folder changes that rendering may read."""
    found = files_of_key(file_names(Path(folder)), {**NOT_READ, "*.safetensors": "weights decide no tokens"})
    return "|".join(f"{name} {stamp_of(Path(folder) / name)}" for name in found)


def load_tokenizer(folder: str, policy: PolicyConfig, adapter: str | None = None) -> Any:
    """The fast tokenizer of a local model folder, or of its adapter's folder where that has one of its own.

    An adapter's chat template goes first in any case. Raises UserError if there is no tokenizer."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"{policy.model}: there is no folder {folder}")
    if adapter is not None and Path(adapter, "tokenizer.json").is_file():
        folder = adapter
    elif adapter is not None and Path(adapter, TEMPLATE_FILE).is_file():
        tokenizer = load_tokenizer(folder, policy)
        tokenizer.chat_template = Path(adapter, TEMPLATE_FILE).read_text(encoding="utf-8")
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=policy.trust_remote_code, local_files_only=True, use_fast=True
        )
    except (OSError, ValueError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"{policy.model}: its folder holds no tokenizer that can be loaded: {first_line}") from error


def position_limit(folder: str) -> int | None:
    """Tokens that the model has positions for, by its config.json; None if it does not say."""
    return _number_of_config(folder, "max_position_embeddings", "n_positions", "max_seq_len")


def vocabulary_size(folder: str) -> int | None:
    """Token ids that the model has embeddings for, by its config.json; None if it does not say."""
    return _number_of_config(folder, "vocab_size")


def _number_of_config(folder: str, *keys: str) -> int | None:
    config = _json_file(folder, "config.json")
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for key in keys:
            value = part.get(key)
            if isinstance(value, int) and 2 <= value <= LARGEST_LIMIT:
                return value
    return None


def stop_token_ids(folder: str) -> list[int]:
    """Tokens at which the model's generation stops, by generation_config.json and config.json."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _json_file(folder, name).get("eos_token_id")
        ids += [id_ for id_ in (value if isinstance(value, list) else [value]) if isinstance(id_, int)]
    return sorted(set(ids))


def _json_file(folder: str, name: str) -> dict[str, Any]:
    path = Path(folder) / name
    if not path.is_file():
        return {}
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def text_behind(tokenizer: Any, before: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of ids that follow others: decoding may drop the space in front of a text, which is one inside of it."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    tail = [int(id_) for id_ in before[-TAIL_TOKENS:]]
    start = str(tokenizer.decode(tail, **options))
    whole = str(tokenizer.decode([*tail, *ids], **options))
    return whole[len(start) :] if whole.startswith(start) else str(tokenizer.decode(list(ids), **options))
