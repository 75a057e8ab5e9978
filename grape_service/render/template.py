"""Chat templates: rendering them in transformers' sandbox, and what has to be known about one."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

import orjson

from grape_service.errors import UserError
from grape_service.render.conversation import USER, AnswerFrame, RenderingError, answer_frame
from grape_service.render.limits import TooManySteps, limited_steps
from grape_service.rows.candidate import Message

RESERVED_KWARGS = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""What the service itself passes to apply_chat_template, or must not pass."""

TODAY = datetime(2024, 7, 26)
"""What templates that write the current date get: rows must have the same tokens on every day.
It is the date that Llama 3's templates fall back to."""

PROBE = USER


class ChatTemplate:
    """A tokenizer's chat template with its extra variables."""

    def __init__(self, tokenizer: Any, chat_template: str | None, kwargs: dict[str, Any]):
        """`chat_template` replaces the tokenizer's own. Raises UserError for a template that cannot be parsed."""
        taken = sorted(RESERVED_KWARGS & set(kwargs))
        if taken:
            raise UserError(f"render.template_kwargs.{taken[0]} is set by the service: remove it")
        self._tokenizer = tokenizer
        self._own = chat_template
        self._kwargs = kwargs
        self._sources: dict[bool, str] = {}
        self._content_is_parts = False
        self.name = "render.chat_template" if chat_template is not None else f"the chat template of {_of(tokenizer)}"
        self._refuse_no_default(tokenizer, chat_template)
        if PROBE not in self._probe():
            self._content_is_parts = True
            if PROBE not in self._probe():
                raise UserError(f"{self.name} leaves out the user's words: give another one as render.chat_template")
        self.frame: AnswerFrame = answer_frame(self, self.name)

    def _probe(self) -> str:
        from jinja2 import TemplateSyntaxError

        try:
            return self.render([{"role": "user", "content": PROBE}], generation_prompt=True)
        except RenderingError as error:
            origin = "render.chat_template" if self._own is not None else "the model's chat template"
            if isinstance(error.__cause__, TooManySteps):
                raise UserError(f"{origin} does not render one short message: {error.__cause__}") from error
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise UserError(f"{origin} is not a template: {error}") from error
            raise UserError(f"{self.name} cannot render a plain question: {error}") from error

    def _refuse_no_default(self, tokenizer: Any, chat_template: str | None) -> None:
        """A model with several templates needs one called default, or the config names one of them."""
        named = tokenizer.chat_template
        if not isinstance(named, dict) or chat_template is not None or "default" in named:
            return
        raise UserError(
            f"{_of(tokenizer)} has several chat templates ({', '.join(sorted(named))}) and none is called default: "
            f"set render.chat_template to one of these names, such as {min(named)}, or to a template"
        )

    def source(self, has_tools: bool) -> str:
        """The Jinja text; models may have a second one for rows with tools."""
        if has_tools not in self._sources:
            text = self._tokenizer.get_chat_template(self._own, [{}] if has_tools else None)
            self._sources[has_tools] = _with_fixed_date(text)
        return self._sources[has_tools]

    def render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, generation_prompt: bool = False
    ) -> str:
        """The conversation as one text. Raises RenderingError with the template's words."""
        try:
            with limited_steps():
                return self._tokenizer.apply_chat_template(
                    [_with_parts(message) for message in messages] if self._content_is_parts else messages,
                    tools=tools or None,
                    chat_template=self.source(bool(tools)),
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                    **self._kwargs,
                )
        except Exception as error:  # a template is a program of others: whatever it raises is about its input
            raise RenderingError(f"{type(error).__name__}: {error}") from error

    def takes_system(self) -> bool:
        """Whether a system message in front is accepted and shows in the text."""
        try:
            text = self.render(
                [{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}], generation_prompt=True
            )
        except RenderingError:
            return False
        return PROBE in text

    def after_response(self) -> str:
        """The text that the template puts after an assistant's words; empty if it refuses a plain conversation."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        try:
            _, found, after = self.render(turns).rpartition(PROBE)
        except RenderingError:
            return ""
        return after if found else ""

    def digest(self) -> str:
        """sha256 of the template text and its variables."""
        sources = [self.source(False), self.source(True)]
        return hashlib.sha256(
            orjson.dumps([sources, self._kwargs], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=str)
        ).hexdigest()


def _of(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path)


def _with_parts(message: Message) -> Message:
    """The message with its content as a list of text parts, which templates of multimodal models go through."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_fixed_date(template: str) -> str:
    if "strftime_now" not in template:
        return template
    body = "format"
    for code in ("%Y", "%y", "%m", "%B", "%b", "%-d", "%d", "%e", "%A", "%a", "%j", "%H", "%I", "%M", "%S", "%p"):
        body += f"|replace('{code}', '{TODAY.strftime(code)}')"
    return "{% macro strftime_now(format) %}{{ " + body + " }}{% endmacro %}{{ '' }}" + template
