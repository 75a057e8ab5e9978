"""What a tokenizer's ids stand for: the bytes that each decodes to, and a digest of the whole tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from grape_service.errors import UserError
from grape_service.rows.ragged import Int64s, gather_rows, offsets_from_lengths, segment_sums

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The ids of one fast tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        special = [id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special]
        self.special_ids = np.array(sorted(special), dtype=np.int64)
        """Tokens that stand for no text."""
        ids = np.fromiter(self._backend.get_vocab(with_added_tokens=True).values(), dtype=np.int64)
        self.size = int(ids.max()) + 1
        self._known = np.zeros(self.size, dtype=bool)
        self._known[ids] = True
        self._lengths: npt.NDArray[np.int32] | None = None
        self._bytes: dict[int, bytes | None] = {}
        self._starts = np.full(self.size, -1, dtype=np.int64)  # in _spelled, of each id that was asked for
        self._spelled = np.zeros(0, np.uint8)

    @property
    def added(self) -> dict[int, str]:
        """Added tokens, special or not, by id."""
        return self._added

    def has(self, id_: int) -> bool:
        """Whether an id is a token."""
        return bool(0 <= id_ < self.size and self._known[id_])

    def text_of(self, id_: int) -> str:
        """How the tokenizer writes an id."""
        return self._added.get(id_) or str(self._backend.id_to_token(id_))

    def knows(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Which of the ids are tokens [N]."""
        inside = (ids >= 0) & (ids < self.size)
        return inside & self._known[np.where(inside, ids, 0)]

    @cached_property
    def digest(self) -> str:
        """sha256 of everything that decides which ids a text gets and what the template's token variables hold."""
        state = orjson.loads(self._backend.to_str())
        state.pop("truncation", None)
        state.pop("padding", None)
        state["special_tokens_map"] = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        return hashlib.sha256(orjson.dumps(state, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @cached_property
    def _decoders(self) -> set[str]:
        decoder = self._backend.decoder
        return set() if decoder is None else set(_types(orjson.loads(decoder.__getstate__())))

    @property
    def spells_text(self) -> bool:
        """Whether the bytes of its ids, one after the other, are the text: not where it writes words without spaces."""
        known = {"ByteLevel", "Metaspace", "Fuse"}
        return bool(self._decoders & known) and not self._decoders & {"WordPiece", "BPEDecoder", "CTC"}

    def bytes_of(self, ids: Iterable[int]) -> list[bytes | None]:
        """The bytes that each id decodes to inside of a text; None for an id that is not a token."""
        found = []
        for id_ in map(int, ids):
            if id_ not in self._bytes:
                self._bytes[id_] = self._bytes_of(id_)
            found.append(self._bytes[id_])
        return found

    def num_bytes(self, texts: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.int64]:
        """How many bytes the ids of each text decode to inside of a text [N]."""
        lengths = self._lengths_of(np.concatenate([np.zeros(0, np.int32), *texts]))
        return segment_sums(lengths.astype(np.int64), offsets_from_lengths([len(text) for text in texts]))

    def spelled(self, ids: npt.NDArray[np.integer]) -> tuple[bytes, Int64s]:
        """What ids [N] decode to inside of a text, and where each begins in it [N + 1]."""
        lengths = self._lengths_of(ids)
        starts = self._starts[ids]
        if (starts < 0).any():
            new = np.unique(ids[starts < 0])
            parts = [self._bytes_of(id_) or b"" for id_ in new.tolist()]
            self._starts[new] = len(self._spelled) + offsets_from_lengths([len(part) for part in parts])[:-1]
            self._spelled = np.concatenate([self._spelled, np.frombuffer(b"".join(parts), np.uint8)])
            starts = self._starts[ids]
        wide = lengths.astype(np.int64)
        return self._spelled[gather_rows(starts, wide)].tobytes(), offsets_from_lengths(wide)

    def _lengths_of(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        if self._lengths is None:
            self._lengths = np.full(self.size, -1, dtype=np.int32)
        lengths = self._lengths[ids]
        if (lengths < 0).any():
            for id_ in np.unique(ids[lengths < 0]).tolist():
                self._lengths[id_] = len(self._bytes_of(id_) or b"")
            lengths = self._lengths[ids]
        return lengths

    def _bytes_of(self, id_: int) -> bytes | None:
        if id_ in self._added:
            return self._added[id_].encode()
        if id_ < 0 or (token := self._backend.id_to_token(id_)) is None:
            return None
        if "ByteLevel" in self._decoders:
            values = [BYTE_OF_CHARACTER.get(character) for character in token]
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        if "ByteFallback" in self._decoders and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if "WordPiece" in self._decoders:
            return token[2:].encode() if token.startswith("##") else f" {token}".encode()
        return token.replace("\u2581", " ").encode()  # sentencepiece writes a space as a low block


def _types(decoder: dict[str, Any]) -> list[str]:
    return [decoder["type"], *(name for part in decoder.get("decoders", []) for name in _types(part))]


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the others as characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def refuse_unspelled(vocabularies: Mapping[str, Vocabulary]) -> None:
    """Raises UserError where the tokenizer of a model, by its name, does not spell the bytes of a text."""
    for name, vocabulary in vocabularies.items():
        if not vocabulary.spells_text:
            raise UserError(
                f"behavior.align: bytes needs tokens that spell the bytes of a text, and those of {name} do not "
                "(WordPiece and word tokenizers leave out spaces or case): use a behavior policy with a byte-level or "
                "SentencePiece tokenizer, or behavior.sources: none for its source"
            )


def incompatible_ids(target: Vocabulary, behavior: Vocabulary, used_ids: np.ndarray) -> list[int]:
    """Those of `used_ids` that do not decode to the same bytes in both tokenizers, ascending.

    Turn-end tokens may differ between policies: leave them out of `used_ids`.
    """
    if target.digest == behavior.digest:
        return []
    ids = np.unique(used_ids).tolist()
    pairs = zip(ids, target.bytes_of(ids), behavior.bytes_of(ids), strict=True)
    return [id_ for id_, ours, theirs in pairs if ours is None or ours != theirs]
