"""Chat templates: what each is given, and what has to be known about one."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple

import orjson

from grape_service.config.schema import RenderConfig
from grape_service.errors import UserError
from grape_service.render.conversation import ANSWER, THOUGHTS, USER, AnswerFrame, answer_frame
from grape_service.render.sandbox import TODAY, NotATemplate, RenderingError, Source, TooMuch
from grape_service.rows.candidate import Message, Tool

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

PROBE = USER


class CallForm(NamedTuple):
    """How a template takes a message that calls tools."""

    as_text: bool = False
    """Arguments are JSON text, which it puts together with other text."""
    no_content: bool = False
    """It looks for calls only where the content is null."""


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
        self._sources: dict[bool, Source] = {}
        self._content_is_parts = False
        self.calls = CallForm()
        self.name = "render.chat_template" if chat_template is not None else f"the chat template of {_of(tokenizer)}"
        self._refuse_no_default(tokenizer, chat_template)
        self._refuse_file_name()
        if PROBE not in self._probe():
            self._content_is_parts = True
            if PROBE not in self._probe():
                raise UserError(f"{self.name} leaves out the user's words: give another one as render.chat_template")
        self.frame: AnswerFrame = answer_frame(self, self.name)
        self.calls = self._find_call_form()
        self.shows_thoughts = any(self._shows_thoughts(name) for name in ("reasoning_content", "reasoning"))

    def _probe(self) -> str:
        try:
            return self.render([{"role": "user", "content": PROBE}], generation_prompt=True)
        except RenderingError as error:
            origin = "render.chat_template" if self._own is not None else "the model's chat template"
            if isinstance(error, TooMuch):
                raise UserError(f"{origin} does not render one short message: {error}") from error
            if isinstance(error, NotATemplate):
                raise UserError(f"{origin} is not a template: {error}") from error
            raise UserError(f"{self.name} cannot render a plain question: {error}") from error

    def _find_call_form(self) -> CallForm:
        """How the template takes calls of tools: as objects, or as the text that it joins them from."""
        if "tool_calls" not in self.source(True).text:
            return CallForm()
        for form in (CallForm(), CallForm(as_text=True), CallForm(no_content=True), CallForm(True, True)):
            arguments: Any = {PROBE: ANSWER}
            function = {"name": THOUGHTS, "arguments": orjson.dumps(arguments).decode() if form.as_text else arguments}
            call = {"id": "qzx7call0", "type": "function", "function": function}
            turn = {"role": "assistant", "content": None if form.no_content else "", "tool_calls": [call]}
            try:
                text = self.render([{"role": "user", "content": "a"}, turn])
            except RenderingError:
                continue
            if THOUGHTS in text and PROBE in text and f"'{PROBE}'" not in text and f'\\"{PROBE}' not in text:
                return form
        return CallForm()

    def _shows_thoughts(self, name: str) -> bool:
        turn = {"role": "assistant", "content": ANSWER, name: THOUGHTS}
        try:
            return THOUGHTS in self.render([{"role": "user", "content": "a"}, turn])
        except RenderingError:
            return False

    def _refuse_no_default(self, tokenizer: Any, chat_template: str | None) -> None:
        """A model with several templates needs one called default, or the config names one of them."""
        named = tokenizer.chat_template
        if not isinstance(named, dict) or chat_template is not None or "default" in named:
            return
        raise UserError(
            f"{_of(tokenizer)} has several chat templates ({', '.join(sorted(named))}) and none is called default: "
            f"set render.chat_template to one of these names, such as {min(named)}, or to a template"
        )

    def _refuse_file_name(self) -> None:
        """What is neither a template nor the name of one is mostly a file's name."""
        text = self.source(False).text
        if self._own is None or "{" in text:
            return
        named = self._tokenizer.chat_template
        known = f" ({', '.join(sorted(named))})" if isinstance(named, dict) else ""
        raise UserError(
            f"render.chat_template {text!r} is neither Jinja text nor the name of one of the model's templates{known}: "
            "write `chat_template: |` and the template itself in the lines below"
        )

    def source(self, has_tools: bool) -> Source:
        """The Jinja text; models may have a second one for rows with tools."""
        if has_tools not in self._sources:
            text = self._tokenizer.get_chat_template(self._own, [{}] if has_tools else None)
            self._sources[has_tools] = Source(text, {**self._tokenizer.special_tokens_map, **self._kwargs})
        return self._sources[has_tools]

    def render(self, messages: list[Message], tools: list[Tool] | None = None, generation_prompt: bool = False) -> str:
        """The conversation as one text. Raises RenderingError with the template's words."""
        if self._content_is_parts:
            messages = [_with_parts(message) for message in messages]
        if self.calls.no_content:
            messages = [_without_content(message) for message in messages]
        return self.source(bool(tools)).render(messages, tools or None, generation_prompt)

    def takes_system(self) -> bool:
        """Whether a system message in front is accepted and shows in the text."""
        try:
            text = self.render(
                [{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}], generation_prompt=True
            )
        except RenderingError:
            return False
        return PROBE in text

    def after_response(self, is_last: bool = True) -> str:
        """The text that the template puts after an assistant's words, the last ones or before a user's; empty if it
        refuses a plain conversation."""
        user = {"role": "user", "content": "a"}
        turns = [user, {"role": "assistant", "content": PROBE}, *([] if is_last else [user])]
        try:
            _, found, after = self.render(turns).rpartition(PROBE)
        except RenderingError:
            return ""
        return after if found else ""

    def digest(self) -> str:
        """sha256 of the template text and its variables."""
        sources = [self.source(False).text, self.source(True).text]
        return hashlib.sha256(
            orjson.dumps(
                [sources, self._kwargs, str(TODAY)], option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=str
            )
        ).hexdigest()


def _of(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path)


def _with_parts(message: Message) -> Message:
    """The message with its content as a list of text parts, which templates of multimodal models go through."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _without_content(message: Message) -> Message:
    """The message with null for its content, if it calls tools and says nothing."""
    return {**message, "content": None} if message.get("tool_calls") and not message["content"] else message


def mode_of(tokenizer: Any, config: RenderConfig) -> Literal["chat", "plain"]:
    """How candidates are rendered. Raises UserError where chat is asked of a model without a template."""
    has_template = bool(config.chat_template or tokenizer.chat_template)
    if config.mode == "chat" and not has_template:
        raise UserError(
            f"render.mode is chat but {tokenizer.name_or_path} has no chat template: "
            "set render.chat_template or render.mode: plain"
        )
    return "chat" if has_template and config.mode != "plain" else "plain"
