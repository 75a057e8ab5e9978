"""A batch before it is encoded: which texts there are, and which sequence is made of which of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from grape_service.render.encoding import Ids
from grape_service.render.messages import RESPONSE_ROLES
from grape_service.rows.candidate import Message, Rejection


@dataclass
class Span:
    """Tokens with loss that follow each other: what was written, then perhaps a turn end."""

    text: int | None = None
    """Index into the batch's texts."""
    is_rendered: bool = False
    """Whether `text` counts among the texts that a template rendered, or among the pool's own."""
    ids: Ids | None = None
    """The tokens, where they are known."""
    turn_end: int | None = None


@dataclass
class Plan:
    """A sequence before it is encoded: contexts[0], spans[0], contexts[1], ...; contexts index rendered texts."""

    contexts: list[int]
    spans: list[Span]
    recorded_logprobs: npt.NDArray[np.float32] | None = None


@dataclass
class Batch:
    """The texts of a batch, each to be encoded once."""

    rendered: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add_rendered(self, text: str) -> int:
        """Index of a text that a template rendered."""
        self.rendered.append(text)
        return len(self.rendered) - 1

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


def recorded_logprobs(values: list[float] | None, num_ids: int) -> npt.NDArray[np.float32] | Rejection | None:
    """Recorded log-probabilities as float32 [num_ids], at most 0."""
    if values is None:
        return None
    try:
        recorded = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        return recorded_mismatch("they are not all numbers")
    if recorded.shape != (num_ids,):
        return recorded_mismatch(f"{recorded.size} values for {num_ids} ids")
    if not np.isfinite(recorded).all() or (recorded > 1e-3).any():
        return recorded_mismatch("a value is not finite or above 0")
    return np.minimum(recorded, 0)


def recorded_mismatch(detail: str) -> Rejection:
    """The rejection of a row whose recorded log-probabilities are not those of its ids."""
    return Rejection("recorded log-probabilities do not match response_ids", detail)
