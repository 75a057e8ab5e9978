"""Proof that a row's tokens are its conversation's: compared with the text, and with the whole encoded in one go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from grape_service.errors import UserError
from grape_service.models.vocabulary import Vocabulary
from grape_service.render.conversation import ANSWER
from grape_service.render.encoding import MARK_CLOSE, MARK_OPEN, Encoder, Ids, same_words
from grape_service.render.sandbox import RenderingError
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from grape_service.rows.columns import LOSS_TOKEN
from grape_service.rows.messages import only_text


class Proved(Protocol):
    """What a proof asks of a renderer."""

    tokenizer: Any
    mode: Literal["chat", "plain"]
    encoder: Encoder
    vocabulary: Vocabulary

    def render(self, candidates: Sequence[Candidate]) -> list[Rendered | Rejection]: ...

    def of(self, candidate: Candidate) -> Proved: ...

    def context_of(self, candidate: Candidate) -> tuple[str | None, str]: ...

    def whole_text(self, candidate: Candidate) -> str: ...

    def encode_whole(self, text: str) -> Ids: ...


PROBES = ["The answer is 7.", "\nYes, it is.", f"{ANSWER} 42", "<think>\nhm\n</think>\n\nSo: 3."]
"""Responses that a renderer is tried on when it starts."""


def prove_renderer(renderer: Proved) -> None:
    """Render a few conversations and compare. Raises UserError with the first thing that is not as it should be."""
    prompt = [{"role": "user", "content": "What is 3 + 4?"}]
    candidates = [Candidate(prompt, text, prompt_id="p", candidate_id="c") for text in PROBES]
    results = renderer.render(candidates)
    usable = [(c, r) for c, r in zip(candidates, results, strict=True) if isinstance(r, Rendered)]
    if not usable:
        first = next(result for result in results if isinstance(result, Rejection))
        raise UserError(
            f"{renderer.tokenizer.name_or_path} cannot render a plain question and answer: "
            f"{first.reason}{f' ({first.detail})' if first.detail else ''}"
        )
    for candidate, rendered in usable:
        problem = problem_of(renderer, candidate, rendered)
        if problem is not None:
            raise UserError(f"{renderer.tokenizer.name_or_path} cannot be rendered with certainty: {problem}")


def problem_of(renderer: Proved, candidate: Candidate, rendered: Rendered) -> str | None:
    """Why the tokens of a row are not those of its conversation, or None where they are.

    The prompt's tokens must say the prompt's text. Where the template renders the whole conversation as prompt,
    response and turn end, and the boundary is one between tokens there too, the tokens must be those of the whole
    text, encoded in one go.
    """
    response = only_text(candidate.response)
    renderer = renderer.of(candidate)
    text, written = renderer.context_of(candidate)
    if text is None or response is None or candidate.response_ids is not None:
        return None
    prompt_ids = rendered.input_ids[: rendered.prompt_len]
    stated = _bytes(renderer, prompt_ids).decode(errors="replace")
    plain = text.replace(MARK_OPEN, "").replace(MARK_CLOSE, "")
    prefix = _bytes(renderer, renderer.encoder.sequence_prefix).decode()
    if renderer.mode == "plain":
        plain = prefix + plain
    if not same_words(_letters(stated), _letters(plain), renderer.encoder.unicode_forms):
        return f"the tokens of the prompt say {_part(stated, plain)} where its text says {_part(plain, stated)}"

    if MARK_OPEN in text or renderer.encoder.has_special(response):  # in one go it would become what it is not
        return None
    if renderer.mode == "plain":
        whole = np.concatenate([renderer.encoder.sequence_prefix, renderer.encode_whole(text + response)])
    else:
        try:
            conversation = renderer.whole_text(candidate)
        except RenderingError:
            return None
        if not any(conversation.startswith(text + space + written) for space in ("", " ")):
            return None  # the template strips or rewrites the response; the policy's own words are taken
        whole = renderer.encode_whole(conversation)
    ids = rendered.input_ids[rendered.loss_mask != 0]
    ids = ids[: int((rendered.loss_mask == LOSS_TOKEN).sum())]
    start = rendered.prompt_len
    if not np.array_equal(whole[:start], prompt_ids):
        return None  # no boundary between tokens
    there = whole[start : start + len(ids)]
    if np.array_equal(there, ids):
        return None
    mine, theirs = _bytes(renderer, ids), _bytes(renderer, whole[start:])
    if not theirs.startswith(mine):  # the tokenizer adds or drops white space there; what the response says is taken
        return None
    same = int(np.argmin(np.append(there == ids[: len(there)], False)))
    if same and len(_bytes(renderer, whole[start : start + same + 1])) > len(mine):  # it ends inside of a token there
        return None
    return (
        f"the response's tokens {ids[:6].tolist()} are not those of the whole conversation, {there[:6].tolist()}, "
        f"for the response {response[:40]!r}"
    )


def _bytes(renderer: Proved, ids: np.ndarray) -> bytes:
    return b"".join(part or b"" for part in renderer.vocabulary.bytes_of(ids))


def _letters(text: str) -> str:
    """A text without white space, as which SentencePiece's own mark for a space counts too."""
    return "".join(text.replace("\u2581", " ").split())


def _part(text: str, other: str) -> str:
    """A few characters of a text from where it differs from another."""
    text, other = _letters(text), _letters(other)
    place = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    return repr(text[max(0, place - 10) : place + 20])
