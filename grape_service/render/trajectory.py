"""Splitting a rendered trajectory into what the policy read and what it wrote.

Assistant turn i wrote what the rendering up to and including it has more than the rendering of everything
before it with a generation prompt, through its turn-end token. That holds only for templates that append:
each rendering has to begin with the one before it. Where one does not (reasoning stripped from past turns,
merged messages, rewritten turns), the row cannot be split with certainty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from grape_service.render.encoding import MARK_CLOSE, MARK_OPEN
from grape_service.render.fields import left_out_field
from grape_service.render.template import ChatTemplate
from grape_service.rows.candidate import Message
from grape_service.rows.messages import tool_names


@dataclass(frozen=True)
class Turn:
    """One assistant turn: the text before it that is not part of an earlier turn, and what was written."""

    context: str
    written: str
    turn_end: str | None
    """The turn-end token's text; None where the last turn has none."""


class SplitError(ValueError):
    """A rendering that cannot be split with certainty."""


def turn_end_pattern(turn_ends: Iterable[str]) -> re.Pattern[str] | None:
    """Finds turn-end tokens that the template wrote, not those that stand marked in a message."""
    alternatives = "|".join(re.escape(text) for text in sorted(turn_ends, key=len, reverse=True))
    return re.compile(f"(?<!{MARK_OPEN})(?:{alternatives})(?!{MARK_CLOSE})") if alternatives else None


def split_trajectory(
    template: ChatTemplate,
    prompt: list[Message],
    response: list[Message],
    tools: list[dict[str, Any]] | None,
    turn_ends: re.Pattern[str] | None,
) -> list[Turn]:
    """The turns of a response of assistant and tool messages, which ends with an assistant message.

    Raises SplitError; RenderingError where the template refuses the messages.
    """
    turns: list[Turn] = []
    text, position = "", 0  # the longest rendering so far, and where the last turn in it ended
    last_seen = 0
    for index, message in enumerate(response):
        if message["role"] != "assistant":
            continue
        before = template.render([*prompt, *response[:index]], tools, generation_prompt=True)
        if not before.startswith(text):
            raise SplitError(f"the template rewrites the turns before response message {index}")
        context = before[position:]
        for earlier in response[last_seen:index]:
            if earlier["content"].strip() not in context:
                raise SplitError(f"the template leaves out what is before response message {index}")
        text = template.render([*prompt, *response[: index + 1]], tools)
        if not text.startswith(before):
            raise SplitError(f"response message {index} does not go on where its generation prompt ends")
        written, turn_end = _cut(text[len(before) :], turn_ends, index, is_last=index + 1 == len(response))
        _check_complete(written, message, index)
        turns.append(Turn(context, written, turn_end))
        position = len(before) + len(written) + len(turn_end or "")
        last_seen = index + 1
    missing = left_out_field(template, [*prompt, *response], tools, len(prompt))
    if missing is not None:
        raise SplitError(f"the template leaves out {missing}")
    return turns


def _cut(rest: str, turn_ends: re.Pattern[str] | None, index: int, is_last: bool) -> tuple[str, str | None]:
    """What a turn wrote and its turn end, from all that its message added to the text."""
    ends = list(turn_ends.finditer(rest)) if turn_ends is not None else []
    if not ends and is_last:
        return rest, None
    if len(ends) != 1 or rest[ends[0].end() :].strip():
        raise SplitError(f"response message {index} does not end with one turn-end token")
    return rest[: ends[0].start()], ends[0][0]


def _check_complete(written: str, message: Message, index: int) -> None:
    parts = [message["content"], message.get("reasoning_content") or "", *tool_names(message)]
    for part in parts:
        if isinstance(part, str) and part.strip() not in written:
            raise SplitError(f"the template leaves out or rewrites a part of response message {index}")
