"""One candidate on its way from a pool row to tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from grape_service.json_types import JsonObject

Message = dict[str, Any]
"""A chat message: role, content and, where the pool has them, tool_calls, tool_call_id, name, reasoning_content."""
Tool = dict[str, Any]
"""The definition of a function that the policy may call, as the pool has it."""
Row = dict[str, Any]
"""A row of a pool or of a release, by column."""


TEMPLATE_KWARGS = "chat_template_kwargs"
"""The column of shards and releases that holds template_kwargs as JSON text, where rows have some."""


@dataclass(slots=True)
class Candidate:
    """A normalised pool row: what is rendered."""

    prompt: list[Message]
    """Chat messages up to the response; a text prompt is one user message."""
    response: str | list[Message]
    """Text, or the assistant and tool messages of a trajectory; "" beside response_ids is what those say."""
    prompt_id: str
    candidate_id: str
    source: str | None = None
    response_ids: list[int] | None = None
    """The response's token ids, taken as they are."""
    response_mask: list[int] | None = None
    """One for each of response_ids: 0 where the policy read a token (a tool's answer) and has no loss on it."""
    recorded_logprobs: list[float | None] | None = None
    """One for each of response_ids; None, NaN, -inf and -9999 or less where it is not known."""
    sampling: JsonObject | None = None
    """temperature, top_p, top_k under which the response was sampled."""
    truncated: bool = False
    """finish_reason was 'length': no turn end is added."""
    finish_reason: str | None = None
    """Why it ended, in the words of the pool."""
    tools: list[Tool] | None = None
    """Tool definitions for the template."""
    template_kwargs: JsonObject | None = None
    """Variables of the chat template for this row, over those of the config."""
    other: Row = field(default_factory=dict)
    """The pool's other columns."""


@dataclass(slots=True)
class Rendered:
    """Token ids of a whole sequence and which of them have loss."""

    input_ids: npt.NDArray[np.int32]  # [T]
    loss_mask: npt.NDArray[np.uint8]  # [T], schemas.LOSS_*
    prompt_len: int
    """Tokens before the first with loss."""
    recorded_logprobs: npt.NDArray[np.float32] | None = None
    """[L], NaN for a turn end that was not recorded."""


@dataclass(slots=True)
class Rejection:
    """Why a row cannot be used."""

    reason: str
    """A short fixed phrase that rejects are counted by."""
    detail: str | None = None
    """What exactly was wrong, for a person."""
    text: str | None = None
    """The beginning of the row, where it could not be read."""


class RendersCandidates(Protocol):
    """What readers of a pool need of a renderer."""

    def render(self, candidates: list[Candidate]) -> list[Rendered | Rejection]: ...
