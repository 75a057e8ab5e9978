"""From plans to tokens: each text of a batch is encoded once, for its place, and put together with loss masks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from grape_service.models.vocabulary import Vocabulary
from grape_service.render.encoding import Encoder, Ids, Place, same_words
from grape_service.render.layout import SequencePlan, TextBatch
from grape_service.rows.candidate import Rejection, Rendered
from grape_service.rows.columns import LOSS_NONE, LOSS_TOKEN, LOSS_TURN_END

TOO_LONG = "longer than max_tokens"


class Assembler:
    """Makes sequences of plans."""

    def __init__(self, encoder: Encoder, vocabulary: Vocabulary, is_plain: bool):
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._is_plain = is_plain
        self.max_tokens: int | None = None
        """Longer sequences are rejected."""

    def sequences(self, plans: list[SequencePlan | Rejection], batch: TextBatch) -> list[Rendered | Rejection]:
        """Tokens and mask of each plan, in order; arrays of one batch are views of one buffer."""
        contexts = self.encode_contexts(batch)
        places = [Place.INSIDE] * len(batch.texts)
        written_places = [Place.INSIDE] * len(batch.written)
        if batch.written or self._encoder.depends_on_place:
            for plan in plans:
                for context, span in (
                    zip(plan.contexts, plan.spans, strict=True) if isinstance(plan, SequencePlan) else ()
                ):
                    if span.text is not None:
                        assert isinstance(context, int), "texts follow texts"
                        there = written_places if span.is_rendered else places
                        there[span.text] = self._encoder.place_after(contexts[context])
        written = self._encoder.encode_written(batch.written, written_places)
        texts = self._encoder.encode_text(batch.texts, places)
        encoded = Encoded(contexts, written, texts, self._are_verbatim(batch.texts, texts))
        sequence = _Sequences()
        rows = [plan if isinstance(plan, Rejection) else self._add(plan, encoded, sequence) for plan in plans]
        return sequence.rendered(rows)

    def encode_contexts(self, batch: TextBatch) -> list[Ids]:
        """Ids of each context of a batch."""
        if self._is_plain:
            prefix = self._encoder.sequence_prefix
            encoded = self._encoder.encode_start(batch.contexts)
            return [np.concatenate([prefix, ids]) for ids in encoded] if len(prefix) else encoded
        first = [place for place, token in enumerate(batch.after) if token is None]
        later = [(place, token) for place, token in enumerate(batch.after) if token is not None]
        contexts: list[Ids] = [np.zeros(0, np.int32)] * len(batch.contexts)
        found = self._encoder.encode_rendered([batch.contexts[place] for place in first])
        after = self._encoder.encode_rendered_after(
            [batch.contexts[place] for place, _ in later], [token for _, token in later]
        )
        for place, ids in zip([*first, *(place for place, _ in later)], [*found, *after], strict=True):
            contexts[place] = ids
        return contexts

    def _are_verbatim(self, texts: list[str], ids: list[Ids]) -> list[bool]:
        """Whether the ids of each text decode to it and nothing else; decoding may drop one space in front of it."""
        wanted = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts], dtype=np.int64)
        more = self._vocabulary.num_bytes(ids) - wanted
        verbatim = (more == 0) | (more == 1) if self._encoder.drops_space else more == 0
        for place in np.flatnonzero(~verbatim).tolist():
            parts = self._vocabulary.bytes_of(ids[place])
            stated = b"".join(part or b"" for part in parts).decode(errors="replace")
            verbatim[place] = same_words(stated, texts[place], self._encoder.unicode_forms)
        return verbatim.tolist()

    def _add(self, plan: SequencePlan, encoded: Encoded, sequences: _Sequences) -> _Row | Rejection:
        """Add a plan's pieces to the batch's sequences."""
        pieces: list[Ids] = []
        values: list[int] = []
        for context, span in zip(plan.contexts, plan.spans, strict=True):
            ids = span.ids
            if ids is None:
                assert span.text is not None, "a span has ids or a text"
                ids = (encoded.written if span.is_rendered else encoded.texts)[span.text]
                if len(ids) == 0:
                    return Rejection("empty response", "the response has no tokens")
                if not span.is_rendered and not encoded.are_verbatim[span.text]:
                    return Rejection(
                        "response is not what its tokens say",
                        "the tokenizer has no tokens for a part of it, or changes it",
                    )
            pieces += (encoded.contexts[context] if isinstance(context, int) else context, ids)
            values += (LOSS_NONE, LOSS_TOKEN)
            if span.turn_end is not None:
                pieces.append(_one(span.turn_end))
                values.append(LOSS_TURN_END)
        lengths = [len(piece) for piece in pieces]
        if lengths[0] == 0:
            return Rejection("empty prompt", "the prompt has no tokens")
        total = sum(lengths)
        if self.max_tokens is not None and total > self.max_tokens:
            return Rejection(TOO_LONG, f"{total} tokens; the limit is {self.max_tokens}")
        first = next((place for place, value in enumerate(values) if value and lengths[place]), len(values))
        return sequences.add(pieces, values, lengths, sum(lengths[:first]), plan.recorded_logprobs)


@dataclass(frozen=True)
class Encoded:
    """The texts of a batch as ids."""

    contexts: list[Ids]
    written: list[Ids]
    texts: list[Ids]
    are_verbatim: list[bool]
    """Of each of `texts`."""


class _Row(NamedTuple):
    """Where a sequence is among those of its batch."""

    start: int
    end: int
    prompt_len: int
    recorded_logprobs: npt.NDArray[np.float32] | None


class _Sequences:
    """The sequences of a batch: all pieces are put together at once, since a call for each row costs more than it."""

    def __init__(self) -> None:
        self._pieces: list[Ids] = []
        self._values: list[int] = []  # of the loss mask, for each piece
        self._lengths: list[int] = []
        self._end = 0

    def add(
        self,
        pieces: list[Ids],
        values: list[int],
        lengths: list[int],
        prompt_len: int,
        recorded: npt.NDArray[np.float32] | None,
    ) -> _Row:
        self._pieces += pieces
        self._values += values
        self._lengths += lengths
        start, self._end = self._end, self._end + sum(lengths)
        return _Row(start, self._end, prompt_len, recorded)

    def rendered(self, rows: list[_Row | Rejection]) -> list[Rendered | Rejection]:
        if not self._pieces:
            return [row for row in rows if isinstance(row, Rejection)]
        ids = np.concatenate(self._pieces)
        mask = np.repeat(np.array(self._values, dtype=np.uint8), self._lengths)
        return [
            row
            if isinstance(row, Rejection)
            else Rendered(ids[row.start : row.end], mask[row.start : row.end], row.prompt_len, row.recorded_logprobs)
            for row in rows
        ]


@lru_cache(maxsize=256)
def _one(id_: int) -> Ids:
    ids = np.array([id_], dtype=np.int32)
    ids.flags.writeable = False
    return ids
