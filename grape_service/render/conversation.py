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
from typing import NamedTuple

from grape_service.errors import UserError
from grape_service.render.fields import RendersMessages
from grape_service.render.sandbox import RenderingError
from grape_service.rows.candidate import Message

USER, ANSWER, THOUGHTS = "qzx7user", "qzx7answer", "qzx7thoughts"
THINKING_ANSWER = f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}"
TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
TAG_STARTS = ("<", "[")
THOUGHT_STARTS = (*TAG_STARTS, "◁")
"""How what opens thoughts begins."""
LONGEST_TAIL = 300
"""Characters of a generation prompt that a response may begin with again."""


class Lead(NamedTuple):
    """From a generation prompt to what stands before an answer: take `cut` from its end, then put `header` there."""

    cut: str = ""
    header: str = ""

    def behind(self, prompt: str) -> str:
        """The text before an answer."""
        return prompt.removesuffix(self.cut) + self.header


@dataclass(frozen=True)
class AnswerFrame:
    """What a template writes before an answer, which the policy does not write."""

    plain: Lead
    """Before an answer without thoughts: nothing, white space, an empty block of thoughts, or a header such as that of
    gpt-oss's final channel."""
    thinking: Lead
    """Before one that begins with <think>, or closes thoughts that the generation prompt opened."""
    closing: Lead
    """Before one that closes thoughts without having opened them."""
    opens_thoughts: bool = False
    """Whether an answer without thoughts stands inside of those that the generation prompt opens."""
    prompt_end: str = ""
    """What follows a user's words in a generation prompt, without white space around."""

    def without_empty_thoughts(self, response: str) -> str:
        """A response without an empty block of thoughts at its beginning, where the template writes that itself."""
        empty = EMPTY_THOUGHTS.match(response)
        return response[empty.end() :] if empty and _ENDS_CLOSED.search(self.plain.header) else response

    def lead(self, response: str) -> Lead:
        """What stands before this response."""
        if response.lstrip().startswith("<think>"):
            return self.thinking
        return self.closing if "</think>" in response else self.plain

    def split(self, before: str, response: str, drops_space: bool) -> tuple[str, str]:
        """What stands before a response, given its generation prompt, and what it has not again.

        A space that the template puts there is one text with the response where decoding drops it (`drops_space`), as
        models with SentencePiece write it.
        """
        begins_with_tag = response.lstrip()[:1] in THOUGHT_STARTS
        if begins_with_tag:
            response = self.without_empty_thoughts(response)
            again = repeated(before, response)[1]
            if again:
                return before, response[len(again) :]
        lead = self.lead(response)
        if lead == Lead("", " ") and drops_space:
            return before, f" {response}"
        if begins_with_tag and lead.header.isspace() and response.lstrip().startswith("<think>"):
            response = response.lstrip()
        return lead.behind(before), response


def answer_frame(template: RendersMessages, name: str) -> AnswerFrame:
    """Find out what stands before answers. Raises UserError where the template cannot be understood."""
    user: list[Message] = [{"role": "user", "content": USER}]
    prompt = template.render(user, generation_prompt=True)
    without = template.render(user)
    whole = _whole(template, user, ANSWER, name)
    place = whole.find(ANSWER)
    if place < 0:
        raise UserError(f"{name} leaves out the assistant's words: give another one as render.chat_template")
    head = whole[:place]
    plain = _lead(prompt, head)
    if plain is None:
        raise UserError(
            f"{name} renders a whole conversation otherwise than its generation prompt goes on "
            f"({_tail(prompt)} there, {_tail(head)} in a conversation): give another one as render.chat_template"
        )
    if plain.header.strip() and prompt == without:
        raise UserError(
            f"{name} does not write {plain.header!r} when it is asked for a generation prompt: "
            "add '{% if add_generation_prompt %}' and that text to it, and give it as render.chat_template"
        )
    end = prompt.rpartition(USER)[2]
    opens = is_open(end)
    thinking = closing = Lead()
    try:
        thinking = _thinking_lead(template, user, prompt, THINKING_ANSWER)
        if not opens:
            closing = _thinking_lead(template, user, prompt, THINKING_ANSWER.removeprefix("<think>\n"))
    except RenderingError:
        pass
    return AnswerFrame(plain, thinking, closing, is_open(plain.behind(end)), end.strip())


def _thinking_lead(template: RendersMessages, user: list[Message], prompt: str, answer: str) -> Lead:
    """What stands before an answer with thoughts, as far as it does not write that itself."""
    whole = template.render([*user, {"role": "assistant", "content": answer}])
    closed = ENDS_EMPTY.search(prompt)  # which stands there only where there are no thoughts
    start = len(prompt) if closed is None or whole.startswith(prompt) else closed.start()
    cut = prompt[start:]
    place = whole.find(answer)
    if place >= 0 and not cut:
        lead = _lead(prompt, whole[:place]) or Lead()
        if (empty := ENDS_EMPTY.search(lead.header)) is None:
            return lead
        opening = "" if answer.startswith("<think>") else THOUGHTS_OPEN.match(empty[0])[0]  # type: ignore[index]
        return Lead("", lead.header[: empty.start()] + opening)  # no place for an empty block before thoughts
    if place < 0:
        place = whole.find(THOUGHTS)
    if place < 0 or not whole.startswith(prompt[:start]):
        return Lead()
    header = whole[start:place]
    if answer.startswith("<think>"):
        header = header.rstrip().removesuffix("<think>")
    return Lead(cut, header) if not TAG.sub("", header).strip() else Lead()


def _whole(template: RendersMessages, user: list[Message], answer: str, name: str) -> str:
    try:
        return template.render([*user, {"role": "assistant", "content": answer}])
    except RenderingError as error:
        raise UserError(f"{name} cannot render a question and its answer: {error}") from None


def _lead(prompt: str, head: str) -> Lead | None:
    """From a generation prompt to what stands before the answer in a whole conversation; None where they part for no
    reason that is known."""
    if head.startswith(prompt):
        return Lead("", head[len(prompt) :])
    if "".join(head.split()) == "".join(prompt.split()):
        return Lead()  # white space apart, as where the generation prompt is written inside of the loop
    common = common_prefix(prompt, head)
    if common.rfind("<") > common.rfind(">"):  # not in the middle of a tag
        common = common[: common.rfind("<")]
    opened, instead = prompt[len(common) :], head[len(common) :]
    if TAG.sub("", THOUGHT_TAG.sub("", opened), count=2).strip() or THOUGHT_TAG.sub("", instead).strip():
        return None
    # The generation prompt opens thoughts, or closes empty ones, where a whole conversation has none; or it opens them
    # where a whole conversation has an empty block, which is then what stands before an answer without thoughts.
    return Lead(opened, instead) if instead.strip() and not is_open(head.rpartition(USER)[2]) else Lead()


OPENINGS = r"<think>|<thought>|<reasoning>|\[THINK\]|<\|channel>\w*|<\|START_THINKING\|>|<seed:think>|◁think▷"
CLOSINGS = r"</think>|</thought>|</reasoning>|\[/THINK\]|<channel\|>|<\|END_THINKING\|>|</seed:think>|◁/think▷"
THOUGHT_TAG = re.compile(f"(?P<opening>{OPENINGS})|(?P<closing>{CLOSINGS})")
EMPTY_THOUGHTS = re.compile(rf"\s*(?:{OPENINGS})\s*(?:{CLOSINGS})\s*")
"""An empty block of thoughts at the beginning of a text, with the white space around it."""
ENDS_EMPTY = re.compile(rf"(?:{OPENINGS})\s*(?:{CLOSINGS})\s*\Z")
THOUGHTS_OPEN = re.compile(rf"(?:{OPENINGS})\n?")
_ENDS_CLOSED = re.compile(rf"(?:{CLOSINGS})\s*\Z")


def is_open(text: str) -> bool:
    """Whether a text ends inside of thoughts."""
    tags = [tag["opening"] for tag in THOUGHT_TAG.finditer(text)]
    return bool(tags) and tags[-1] is not None


def _tail(text: str) -> str:
    return repr(text[-40:])


def repeated(prompt: str, response: str) -> tuple[str, str]:
    """The end of a prompt with which a response begins again, such as <think>: (as in the prompt, as in the response).

    Both are empty where it does not.
    """
    if response.lstrip()[:1] not in TAG_STARTS:
        return "", ""
    for tail, mark, space in _tails(prompt[-LONGEST_TAIL:]):
        found = mark.match(response)
        if found:
            return tail, found[0] + common_prefix(space, response[found.end() :])
    closed, empty = _ENDS_CLOSED.search(prompt), EMPTY_THOUGHTS.match(response)
    return (closed[0], empty[0]) if closed and empty else ("", "")


@lru_cache(maxsize=4096)  # the candidates of a prompt share it
def _tails(end: str) -> list[tuple[str, re.Pattern[str], str]]:
    """What follows each tag in the end of a prompt, with the tag: whole, what says the same with other white space
    before and between its tags, and the white space at its end."""
    tails = [end[tag.start() :] for tag in TAG.finditer(end)]
    return [(tail, _in_other_space(tail), tail[len(tail.rstrip()) :]) for tail in tails]


def _in_other_space(tail: str) -> re.Pattern[str]:
    parts = [part for piece in re.split(f"({TAG.pattern})", tail) for part in piece.split()]
    return re.compile(r"\s*" + r"\s*".join(map(re.escape, parts)))


def common_prefix(one: str, other: str) -> str:
    """The longest beginning that two texts share."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(left for left, _ in same)
