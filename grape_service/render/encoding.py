"""Text to token ids with the fast tokenizer, in batches: trusted text of templates, untrusted text of pools.

Pool text never becomes a special token: "<|im_end|>" in a response is encoded as the characters it is
made of. In text that a template rendered, the template's own special tokens are what they are, and the
pool's are marked before the rendering (`Encoder.protect`) so that they can be told apart after it.
Added tokens that are not special stay tokens everywhere, and so do those that open and close thoughts, such as
<think>, which the policy itself writes.

Many tokenizers put a space before every text (SentencePiece's dummy prefix, Metaspace, add_prefix_space). A
sequence is encoded in pieces but has to be what one text would be, so a piece is encoded for its place: at the
start of the text, right after an added token, or in the middle of a text, where no space is put before it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from grape_service.rows.control_tokens import Traces

Ids = npt.NDArray[np.int32]

MARK_OPEN, MARK_CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters, which Unicode keeps for use inside of programs."""

CHUNK_CHARACTERS = 2**22

THOUGHT = re.compile(r"\W*(?:(?:begin|end)_of_)?(?:think|thinking|thought|reasoning)\W*", re.IGNORECASE)
"""Added tokens around thoughts: a policy writes them, whether its tokenizer calls them special or not."""


class Place(Enum):
    """What stands before a piece of text in its sequence."""

    AFTER_TOKEN = "after an added token"
    INSIDE = "in the middle of a text"


class Encoder:
    """Encodes with one tokenizer, which knows special tokens, and copies of it, which do not."""

    def __init__(self, tokenizer: Any):
        self._template_backend = tokenizer.backend_tokenizer
        self._template_backend.no_truncation()
        self._template_backend.no_padding()
        state = orjson.loads(self._template_backend.to_str())
        copies = {orjson.dumps(state): self._template_backend}
        self._template_inside = _copy(_without_prefix(state, Place.INSIDE), copies)
        self._template_after = _copy(_without_prefix(state, Place.AFTER_TOKEN), copies)
        for token in state.get("added_tokens") or []:
            token["special"] = token["special"] and THOUGHT.fullmatch(token["content"]) is None
        copies = {}
        self._text_start = _copy(state, copies)
        self._text_at = {place: _copy(_without_prefix(state, place), copies) for place in Place}
        self._text_backends = list(copies.values())
        for backend in self._text_backends:
            backend.encode_special_tokens = True
        self.depends_on_place = self._text_at[Place.INSIDE] is not self._text_at[Place.AFTER_TOKEN]
        added = tokenizer.added_tokens_decoder.items()
        self.added = {id_: token.content for id_, token in added}
        self._special_contents = {token.content for _, token in added if token.special} - {
            content for content in self.added.values() if THOUGHT.fullmatch(content)
        }
        self.make_special([])
        with_prefix = self._template_backend.encode("a").ids
        without = self._template_backend.encode("a", add_special_tokens=False).ids
        start = with_prefix.index(without[0])
        self.sequence_prefix: Ids = np.array(with_prefix[:start], dtype=np.int32)
        """What the tokenizer itself puts in front of a text: a beginning-of-sequence token, or nothing."""
        self.drops_space = self._template_backend.decode(self._template_inside.encode(" a").ids) == "a"
        """Whether decoding drops a space before a text, as SentencePiece does with its dummy prefix."""

        self.unicode_forms = _unicode_forms(state.get("normalizer"))
        """Unicode normal forms that the tokenizer brings texts into."""

    def make_special(self, contents: Sequence[str]) -> None:
        """From now on pool text does not become these added tokens either."""
        from tokenizers import AddedToken

        contents = [content for content in contents if THOUGHT.fullmatch(content) is None]
        new = [AddedToken(content, special=True) for content in contents if content not in self._special_contents]
        for backend in self._text_backends:
            backend.add_special_tokens(new)
        self._special_contents.update(contents)
        alternatives = "|".join(re.escape(content) for content in sorted(self._special_contents, key=len, reverse=True))
        self._special = re.compile(alternatives) if alternatives else None
        self._traces = Traces(content[:3] for content in self._special_contents)
        self._marked = re.compile(f"{MARK_OPEN}({alternatives}){MARK_CLOSE}") if alternatives else None

    @property
    def special_ids(self) -> list[int]:
        """Ids of special tokens, other than those around thoughts."""
        return [id_ for id_, content in self.added.items() if content in self._special_contents]

    def protect(self, value: Any) -> Any:
        """The value (text, or lists and dicts of it) with each special token's string between marks."""
        if isinstance(value, str):
            if self._special is None or not self.has_special(value):
                return value
            return self._special.sub(lambda match: f"{MARK_OPEN}{match[0]}{MARK_CLOSE}", value)
        if isinstance(value, dict):
            return {key: self.protect(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        return value

    def is_cut(self, text: str) -> bool:
        """Whether a template cut protected text at a special token, so that a mark is left without its other half."""
        if MARK_OPEN not in text and MARK_CLOSE not in text:
            return False
        rest = self._marked.sub("", text) if self._marked is not None else text
        return MARK_OPEN in rest or MARK_CLOSE in rest

    def encode_start(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text of the pool at the start of a sequence; nothing in it is special."""
        return _encode(self._text_start, texts)

    def encode_text(self, texts: Sequence[str], places: Sequence[Place]) -> list[Ids]:
        """Ids of each text of the pool, in which nothing is special, for its place in its sequence."""
        return self._by_place(self._text_at, texts, places)

    def encode_rendered(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text that a template rendered, at the start of a sequence; what stands between marks is not
        special."""
        return self._encode_marked(self._template_backend, texts)

    def encode_rendered_after(self, texts: Sequence[str], tokens: Sequence[int]) -> list[Ids]:
        """Ids of each text that a template rendered right after an added token."""
        # The token itself stands in front: it may take the white space behind it (rstrip).
        whole = [self.added[token] + text for token, text in zip(tokens, texts, strict=True)]
        return [ids[1:] for ids in self._encode_marked(self._template_backend, whole)]

    def encode_written(self, texts: Sequence[str], places: Sequence[Place]) -> list[Ids]:
        """Ids of each text that a template rendered of what a policy wrote, for its place."""
        backends = {Place.INSIDE: self._template_inside, Place.AFTER_TOKEN: self._template_after}
        found: list[Ids] = [np.zeros(0, np.int32)] * len(texts)
        for place, backend in backends.items():
            rows = [row for row, there in enumerate(places) if there is place]
            for row, ids in zip(rows, self._encode_marked(backend, [texts[row] for row in rows]), strict=True):
                found[row] = ids
        return found

    def place_after(self, ids: Ids) -> Place:
        """The place of a text that follows these ids."""
        return Place.AFTER_TOKEN if len(ids) and int(ids[-1]) in self.added else Place.INSIDE

    def whole(self, text: str) -> Ids:
        """Ids of a whole text of trusted words as the tokenizer itself encodes it, in one go."""
        return np.array(self._template_backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def first_special(self, text: str) -> str | None:
        """The first string of a special token in a text of the pool, or None."""
        if self._special is None or not self._traces.are_in(text):
            return None
        found = self._special.search(text)
        return found[0] if found else None

    def has_special(self, text: str) -> bool:
        """Whether a text of the pool holds the string of a special token."""
        return self.first_special(text) is not None

    def _by_place(self, backends: dict[Place, Any], texts: Sequence[str], places: Sequence[Place]) -> list[Ids]:
        if not self.depends_on_place:
            return _encode(backends[Place.INSIDE], texts)
        found: list[Ids] = [np.zeros(0, np.int32)] * len(texts)
        for place, backend in backends.items():
            rows = [row for row, there in enumerate(places) if there is place]
            for row, ids in zip(rows, _encode(backend, [texts[row] for row in rows]), strict=True):
                found[row] = ids
        return found

    def _encode_marked(self, backend: Any, texts: Sequence[str]) -> list[Ids]:
        marked = [index for index, text in enumerate(texts) if MARK_OPEN in text]
        ids = _encode(backend, ["" if MARK_OPEN in text else text for text in texts])
        for index in marked:
            ids[index] = self._encode_pieces(backend, texts[index])
        return ids

    def _encode_pieces(self, backend: Any, text: str) -> Ids:
        if self._marked is None:
            return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        ids: list[int] = []
        for index, piece in enumerate(self._marked.split(text)):  # rendered, marked, rendered, ...
            if not piece:
                continue
            if index % 2:
                place = self.place_after(np.array(ids[-1:], dtype=np.int32))
                used = self._text_at[place] if ids else self._text_start
            else:
                used = self._template_inside if ids else backend
            ids += used.encode(piece, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)


def _copy(state: dict[str, Any], copies: dict[bytes, Any]) -> Any:
    """A tokenizer of that state: one of `copies`, by state, or a new one among them. A copy of a vocabulary is slow."""
    text = orjson.dumps(state)
    if text not in copies:
        copies[text] = _new(text.decode())
    return copies[text]


def _new(state: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(state)


def _without_prefix(state: dict[str, Any], place: Place) -> dict[str, Any]:
    """A tokenizer's state without the space that it puts before a text in this place.

    Right after an added token a normalizer's Prepend and a Metaspace that is `always` put one also where the whole
    text is encoded in one go, and decoding takes it away; ByteLevel's add_prefix_space puts one that stays, so it goes.
    """

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(item) for item in part if not (inside and isinstance(item, dict) and is_prepend(item))]
        if not isinstance(part, dict):
            return part
        part = {
            key: changed(value) if key in ("normalizers", "pretokenizers") else value for key, value in part.items()
        }
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            part["add_prefix_space"] = False
        if part.get("type") == "Metaspace" and (inside or part.get("prepend_scheme") == "first"):
            part["prepend_scheme"] = "never"
            if "add_prefix_space" in part:
                part["add_prefix_space"] = False
        return part

    def is_prepend(part: dict[str, Any]) -> bool:
        return part.get("type") == "Prepend"

    inside = place is Place.INSIDE
    normalizer = state.get("normalizer")
    if inside and isinstance(normalizer, dict) and is_prepend(normalizer):
        normalizer = None
    return {**state, "normalizer": changed(normalizer), "pre_tokenizer": changed(state.get("pre_tokenizer"))}


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


def _unicode_forms(normalizer: Any) -> list[str]:
    if not isinstance(normalizer, dict):
        return []
    kind = normalizer.get("type")
    own = [kind] if kind in ("NFC", "NFD", "NFKC", "NFKD") else ["NFKC"] if kind == "Precompiled" else []
    return own + [form for part in normalizer.get("normalizers") or [] for form in _unicode_forms(part)]


def same_words(stated: str, text: str, forms: Sequence[str]) -> bool:
    """Whether two texts are the same, but for Unicode normal forms that a tokenizer brings texts into."""
    for form in forms:
        stated, text = unicodedata.normalize(form, stated), unicodedata.normalize(form, text)  # type: ignore[arg-type]
    return stated == text


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8 (a lone surrogate cannot)."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
