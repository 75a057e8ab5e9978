"""From plans to tokens: each text of a batch is encoded once, for its place, and put together with loss masks."""

from __future__ import annotations

import numpy as np

from grape_service.models.vocabulary import Vocabulary
from grape_service.render.encoding import Encoder, Ids, Place, same_words
from grape_service.render.layout import Batch, Plan
from grape_service.rows.candidate import Rejection, Rendered
from grape_service.rows.columns import LOSS_NONE, LOSS_TOKEN, LOSS_TURN_END


class Assembler:
    """Makes sequences of plans."""

    def __init__(self, encoder: Encoder, vocabulary: Vocabulary, is_plain: bool):
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._is_plain = is_plain
        self.max_tokens: int | None = None
        """Longer sequences are rejected."""

    def sequences(self, plans: list[Plan | Rejection], batch: Batch) -> list[Rendered | Rejection]:
        """Tokens and mask of each plan, in order."""
        contexts = self._encode_contexts(batch)
        places = [Place.INSIDE] * len(batch.texts)
        written_places = [Place.INSIDE] * len(batch.written)
        for plan in plans:
            for context, span in zip(plan.contexts, plan.spans, strict=True) if isinstance(plan, Plan) else ():
                if span.text is not None:
                    there = written_places if span.is_rendered else places
                    there[span.text] = self._encoder.place_after(contexts[context])
        written = self._encoder.encode_written(batch.written, written_places)
        texts = self._encoder.encode_text(batch.texts, places)
        return [
            plan if isinstance(plan, Rejection) else self._assemble(plan, batch, contexts, written, texts)
            for plan in plans
        ]

    def _encode_contexts(self, batch: Batch) -> list[Ids]:
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

    def _is_verbatim(self, text: str, lead: int, ids: Ids) -> bool:
        """Whether ids decode to the response and nothing else; decoding may drop one space in front of it."""
        wanted, decoded = len(text.encode()), self._vocabulary.num_bytes(ids)
        if decoded == wanted or (decoded == wanted + 1 and self._encoder.drops_space):
            return True
        parts = self._vocabulary.bytes_of(ids)
        stated = b"".join(part or b"" for part in parts).decode(errors="replace")
        return same_words(stated, text, self._encoder.unicode_forms)

    def _assemble(
        self, plan: Plan, batch: Batch, contexts: list[Ids], written: list[Ids], texts: list[Ids]
    ) -> Rendered | Rejection:
        pieces: list[Ids] = []
        values: list[int] = []
        for context, span in zip(plan.contexts, plan.spans, strict=True):
            ids = span.ids
            if ids is None:
                assert span.text is not None, "a span has ids or a text"
                ids = (written if span.is_rendered else texts)[span.text]
                if len(ids) == 0:
                    return Rejection("empty response", "the response has no tokens")
                if not span.is_rendered and not self._is_verbatim(batch.texts[span.text], span.lead, ids):
                    return Rejection(
                        "response is not what its tokens say",
                        "the tokenizer has no tokens for a part of it, or changes it",
                    )
            pieces += [contexts[context], ids]
            values += [LOSS_NONE, LOSS_TOKEN]
            if span.turn_end is not None:
                pieces.append(np.array([span.turn_end], dtype=np.int32))
                values.append(LOSS_TURN_END)
        lengths = [len(piece) for piece in pieces]
        if lengths[0] == 0:
            return Rejection("empty prompt", "the prompt has no tokens")
        total = sum(lengths)
        if self.max_tokens is not None and total > self.max_tokens:
            return Rejection("longer than max_tokens", f"{total} tokens; the limit is {self.max_tokens}")
        return Rendered(
            input_ids=np.concatenate(pieces),
            loss_mask=np.repeat(np.array(values, dtype=np.uint8), lengths),
            prompt_len=lengths[0],
            recorded_logprobs=plan.recorded_logprobs,
        )
