"""What a chat template does around an answer, found out by rendering a few conversations.

With P the rendering of a prompt with its generation prompt and W that of the whole conversation, W should go on where
P ends, with the answer and its turn end. Templates differ from that in known ways, which are told apart here; what is
none of them is refused, since nobody could say which tokens the answer is made of.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from grape_service.errors import UserError
from grape_service.rows.candidate import Message

USER, ANSWER, THOUGHTS = "qzx7user", "qzx7answer", "qzx7thoughts"
THINKING_ANSWER = f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}"
TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
TAG_STARTS = ("<", "[")
LONGEST_TAIL = 300
"""Characters of a generation prompt that a response may begin with again."""


class RenderingError(Exception):
    """A template refused the messages, or failed on them."""


class Renders(Protocol):
    """What is asked of a template."""

    def render(self, messages: list[Message], tools: None = None, generation_prompt: bool = False) -> str: ...


@dataclass(frozen=True)
class AnswerFrame:
    """What a template puts between the generation prompt and an answer, which the policy does not write."""

    plain: str
    """Before an answer without thoughts: nothing, white space, or a header such as gpt-oss's final channel."""
    thinking: str
    """Before one that begins with <think> or closes its thoughts."""
    opens_thoughts: bool = False
    """Whether the generation prompt ends with <think>."""

    def before(self, response: str) -> str:
        """What stands before this response."""
        return self.thinking if is_thinking(response) else self.plain


def is_thinking(response: str) -> bool:
    """Whether a response brings thoughts of its own, or ends those that its generation prompt opened."""
    return response.startswith("<think>") or "</think>" in response


def answer_frame(template: Renders, name: str) -> AnswerFrame:
    """Find out what stands before answers. Raises UserError where the template cannot be understood."""
    user: list[Message] = [{"role": "user", "content": USER}]
    prompt = template.render(user, generation_prompt=True)
    without = template.render(user)
    whole = _whole(template, user, ANSWER, name)
    place = whole.find(ANSWER)
    if place < 0:
        raise UserError(f"{name} leaves out the assistant's words: give another one as render.chat_template")
    head = whole[:place]
    plain = _gap(prompt, head)
    if plain is None:
        raise UserError(
            f"{name} renders a whole conversation otherwise than its generation prompt goes on "
            f"({_tail(prompt)} there, {_tail(head)} in a conversation): give another one as render.chat_template"
        )
    if plain.strip() and prompt == without:
        raise UserError(
            f"{name} does not write {plain!r} when it is asked for a generation prompt: "
            "add '{% if add_generation_prompt %}' and that text to it, and give it as render.chat_template"
        )
    opens = prompt.rstrip().endswith("<think>") and "</think>" not in plain
    try:
        whole = template.render([*user, {"role": "assistant", "content": THINKING_ANSWER}])
    except RenderingError:
        return AnswerFrame(plain, "", opens)
    place = whole.find(THINKING_ANSWER)
    thinking = _gap(prompt, whole[:place]) if place >= 0 else None
    return AnswerFrame(plain, thinking or "", opens)


def _whole(template: Renders, user: list[Message], answer: str, name: str) -> str:
    try:
        return template.render([*user, {"role": "assistant", "content": answer}])
    except RenderingError as error:
        raise UserError(f"{name} cannot render a question and its answer: {error}") from None


def _gap(prompt: str, head: str) -> str | None:
    """What stands between a generation prompt and the answer in a whole conversation; None where they part."""
    if head.startswith(prompt):
        return head[len(prompt) :]
    if "".join(head.split()) == "".join(prompt.split()):
        return ""  # white space apart, as where the generation prompt is written inside of the loop
    common = common_prefix(prompt, head)
    if common.rfind("<") > common.rfind(">"):  # not in the middle of a tag
        common = common[: common.rfind("<")]
    opened, instead = prompt[len(common) :], head[len(common) :]
    # The generation prompt alone opens thoughts, which a whole conversation has as part of its answer, or not at all.
    instead = re.sub(r"</?think>", "", instead)
    return "" if not instead.strip() and not TAG.sub("", opened, count=2).strip() else None


def _tail(text: str) -> str:
    return repr(text[-40:])


def repeated(prompt: str, response: str) -> tuple[str, str]:
    """The end of a prompt with which a response begins again, such as <think>: (as in the prompt, as in the response).

    Both are empty where it does not.
    """
    if response[:1] not in TAG_STARTS:
        return "", ""
    for tail, mark in _tails(prompt[-LONGEST_TAIL:]):
        if response.startswith(mark):
            space = common_prefix(tail[len(mark) :], response[len(mark) :])
            return tail, mark + space
    return "", ""


@lru_cache(maxsize=4096)  # the candidates of a prompt share it
def _tails(end: str) -> list[tuple[str, str]]:
    """What follows each tag in the end of a prompt, with the tag: (whole, without the white space at its end)."""
    tails = [end[tag.start() :] for tag in TAG.finditer(end)]
    return [(tail, tail.rstrip()) for tail in tails]


def common_prefix(one: str, other: str) -> str:
    """The longest beginning that two texts share."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(left for left, _ in same)
