"""One candidate on its way from a pool row to tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Message = dict[str, Any]
"""A chat message: role, content and, where the pool has them, tool_calls, tool_call_id, name, reasoning_content."""


@dataclass(slots=True)
class Candidate:
    """A normalised pool row: what is rendered."""

    prompt: list[Message]
    """Chat messages up to the response; a text prompt is one user message."""
    response: str | list[Message]
    """Text, or the assistant and tool messages of a trajectory."""
    prompt_id: str
    candidate_id: str
    source: str | None = None
    response_ids: list[int] | None = None
    """The response's token ids, taken as they are."""
    recorded_logprobs: list[float] | None = None
    """One for each of response_ids."""
    sampling: dict[str, Any] | None = None
    """temperature, top_p, top_k under which the response was sampled."""
    truncated: bool = False
    """finish_reason was 'length': no turn end is added."""
    finish_reason: str | None = None
    """Why it ended, in the words of the pool."""
    tools: list[dict[str, Any]] | None = None
    """Tool definitions for the template."""
    other: dict[str, Any] = field(default_factory=dict)
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
