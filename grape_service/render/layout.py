"""A batch before it is encoded: which texts there are, and which sequence is made of which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from grape_service.models.vocabulary import Vocabulary
from grape_service.render.encoding import Ids
from grape_service.render.messages import RESPONSE_ROLES
from grape_service.rows.candidate import Message, Rejection, Rendered
from grape_service.rows.columns import LOSS_NONE, LOSS_TOKEN, LOSS_TURN_END


@dataclass(slots=True)
class Span:
    """Tokens with loss that follow each other: what was written, then perhaps a turn end."""

    text: int | None = None
    """Index into the batch's texts."""
    is_rendered: bool = False
    """Whether `text` counts among the texts that a template rendered, or among the pool's own."""
    ids: Ids | None = None
    """The tokens, where they are known."""
    turn_end: int | None = None


@dataclass(slots=True)
class SequencePlan:
    """A sequence before it is encoded: contexts[0], spans[0], contexts[1], ...; contexts index the batch's, or are ids.

    Contexts and spans of ids may be empty.
    """

    contexts: Sequence[int | Ids]
    spans: list[Span]
    recorded_logprobs: npt.NDArray[np.float32] | None = None


@dataclass
class TextBatch:
    """The texts of a batch, each to be encoded once."""

    contexts: list[str] = field(default_factory=list)
    """What a template, or the prompt in plain mode, puts before what was written."""
    after: list[int | None] = field(default_factory=list)
    """For each context the turn end that it follows; None where it begins a sequence."""
    written: list[str] = field(default_factory=list)
    """What a template rendered of a policy's messages."""
    texts: list[str] = field(default_factory=list)
    """Responses of the pool."""

    def add_context(self, text: str, after: int | None = None) -> int:
        """Index of a context."""
        self.contexts.append(text)
        self.after.append(after)
        return len(self.contexts) - 1

    def add_written(self, text: str) -> int:
        """Index of a text that a template rendered of what was written."""
        self.written.append(text)
        return len(self.written) - 1

    def add_text(self, text: str) -> int:
        """Index of a text of the pool."""
        self.texts.append(text)
        return len(self.texts) - 1


def trajectory_problem(response: list[Message]) -> Rejection | None:
    """Why a list of messages cannot be a response, if it cannot."""
    if not response:
        return Rejection("empty response")
    for message in response:
        if message.get("role") not in RESPONSE_ROLES:
            return Rejection("unknown role in the response", f"'{message.get('role')}' is not assistant or tool")
    if response[-1]["role"] != "assistant":
        return Rejection("response does not end with an assistant turn")
    return None


def shared_spans(
    target: Rendered,
    target_turn_end_id: int | None,
    vocabulary: Vocabulary,
    turn_end_id: int | None,
    stop_ids: frozenset[int],
) -> tuple[list[Ids], list[Span]] | Rejection:
    """The target's spans with loss as a policy with this vocabulary and these turn ends gets them, and the target's
    ids before each."""
    ids, mask = target.input_ids, target.loss_mask
    with_loss = mask != LOSS_NONE
    ends = with_loss & ~np.append(with_loss[1:], False) | (mask == LOSS_TURN_END)
    unknown = ids[(mask == LOSS_TOKEN) & ~vocabulary.knows(ids)]
    if len(unknown):
        return Rejection("token id outside the vocabulary", f"{unknown[0]} is not a token of the behavior policy")
    read: list[Ids] = []
    spans: list[Span] = []
    start = 0
    for end in np.flatnonzero(ends):
        before = start
        start += int(np.argmax(with_loss[start:]))
        read.append(ids[before:start])
        written, last = ids[start : end + 1], int(ids[end])
        start = int(end) + 1
        if mask[end] != LOSS_TURN_END:
            spans.append(Span(ids=written))
            continue
        own = last if last != target_turn_end_id and last in stop_ids else turn_end_id
        if own is None:
            return Rejection("no turn end", "the behavior policy has no token that ends a turn")
        spans.append(Span(ids=written[:-1], turn_end=own))
    return read, spans
