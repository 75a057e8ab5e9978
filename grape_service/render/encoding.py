"""Text to token ids with the fast tokenizer, in batches: trusted text of templates, untrusted text of pools.

Pool text never becomes a special token: "<|im_end|>" in a response is encoded as the characters it is
made of. In text that a template rendered, the template's own special tokens are what they are, and the
pool's are marked before the rendering (`Encoder.protect`) so that they can be told apart after it.
Added tokens that are not special, such as a <think> that the policy itself writes, stay tokens everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]

MARK_OPEN, MARK_CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters, which Unicode keeps for use inside of programs."""

CHUNK_CHARACTERS = 2**22


class Encoder:
    """Encodes with one tokenizer, which knows special tokens, and a copy of it, which does not."""

    def __init__(self, tokenizer: Any):
        from tokenizers import Tokenizer

        self._template_backend = tokenizer.backend_tokenizer
        self._template_backend.no_truncation()
        self._template_backend.no_padding()
        self._text_backend = Tokenizer.from_str(self._template_backend.to_str())
        self._text_backend.encode_special_tokens = True
        added = tokenizer.added_tokens_decoder.values()
        self._special_contents = {token.content for token in added if token.special}
        self.make_special([])
        with_prefix = self._template_backend.encode("a").ids
        without = self._template_backend.encode("a", add_special_tokens=False).ids
        start = with_prefix.index(without[0])
        self.sequence_prefix: Ids = np.array(with_prefix[:start], dtype=np.int32)
        """What the tokenizer itself puts in front of a text: a beginning-of-sequence token, or nothing."""

    def make_special(self, contents: Sequence[str]) -> None:
        """From now on pool text does not become these added tokens either."""
        from tokenizers import AddedToken

        new = [AddedToken(content, special=True) for content in contents if content not in self._special_contents]
        self._text_backend.add_special_tokens(new)
        self._special_contents.update(contents)
        alternatives = "|".join(re.escape(content) for content in sorted(self._special_contents, key=len, reverse=True))
        self._special = re.compile(alternatives) if alternatives else None
        self._marked = re.compile(f"{MARK_OPEN}({alternatives}){MARK_CLOSE}") if alternatives else None

    def protect(self, value: Any) -> Any:
        """The value (text, or lists and dicts of it) with each special token's string between marks."""
        if isinstance(value, str):
            if self._special is None or self._special.search(value) is None:
                return value
            return self._special.sub(lambda match: f"{MARK_OPEN}{match[0]}{MARK_CLOSE}", value)
        if isinstance(value, dict):
            return {key: self.protect(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        return value

    def encode_text(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, in which nothing is special."""
        return _encode(self._text_backend, texts)

    def encode_rendered(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text that a template rendered; what stands between marks is not special."""
        marked = [index for index, text in enumerate(texts) if MARK_OPEN in text]
        ids = _encode(self._template_backend, ["" if MARK_OPEN in text else text for text in texts])
        for index in marked:
            ids[index] = self._encode_marked(texts[index])
        return ids

    def _encode_marked(self, text: str) -> Ids:
        if self._marked is None:
            return np.array(self._template_backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        ids: list[int] = []
        for index, piece in enumerate(self._marked.split(text)):  # rendered, marked, rendered, ...
            backend = self._text_backend if index % 2 else self._template_backend
            ids += backend.encode(piece, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)


def _encode(backend: Any, texts: Sequence[str]) -> list[Ids]:
    """Ids of each text, in chunks of CHUNK_CHARACTERS: the tokenizer's objects take 100 bytes per token and more."""
    ids: list[Ids] = []
    start = size = 0
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size >= CHUNK_CHARACTERS or stop == len(texts):
            encodings = backend.encode_batch_fast(texts[start:stop], add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            start, size = stop, 0
    return ids


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8 (a lone surrogate cannot)."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
