"""The text of a prompt under one policy, up to where a response begins."""

from __future__ import annotations

from grape_service.render.encoding import Encoder, is_encodable
from grape_service.render.fields import left_out_field, left_out_words
from grape_service.render.messages import MessageError, MessageForm
from grape_service.render.sandbox import RenderingError
from grape_service.render.template import ChatTemplate
from grape_service.rows.candidate import Candidate, Message, Rejection, Tool
from grape_service.rows.control_tokens import rendered_opening
from grape_service.rows.prefill import without_prefill


class PromptTexts:
    """Prompts as a template renders them, with its generation prompt; without a template, joined by a separator."""

    def __init__(
        self,
        template: ChatTemplate | None,
        form: MessageForm,
        encoder: Encoder,
        separator: str,
        system_prompt: str | None,
    ):
        self._template, self._form, self._encoder = template, form, encoder
        self._separator, self._system_prompt = separator, system_prompt

    def of(self, candidate: Candidate) -> str | Rejection:
        """The text of a candidate's prompt, up to where the assistant's turn begins; or why none is all of it."""
        try:
            messages = self._form.prompt(without_prefill(candidate.prompt))
            if not any(message["content"] or message.get("tool_calls") for message in messages):
                return Rejection("empty prompt")
            header = self._rendered_header(messages)
            if header is not None:
                return Rejection(
                    "prompt is already rendered", f"a template wrote its '{header}': give its messages, or their words"
                )
            if self._template is None:
                text = self._plain(candidate, messages)
            else:
                text = self._chat(self._template, messages, candidate.tools)
        except (MessageError, RenderingError) as error:
            return Rejection("prompt cannot be rendered", str(error))
        return text if is_encodable(text) else Rejection("not UTF-8", "the prompt holds a lone surrogate")

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Messages with the policy's system prompt in front, where they have none of their own."""
        if self._system_prompt is None or messages[0].get("role") in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self._system_prompt}, *messages]

    def _rendered_header(self, messages: list[Message]) -> str | None:
        """What shows that a template has rendered a prompt before: a message's header of any model, or the end of
        this one's generation prompt."""
        end = "" if self._template is None else self._template.frame.prompt_end
        for message in messages:
            if message["role"] in ("user", "system"):
                text = message["content"]
                if (header := rendered_opening(text)) is not None:
                    return header
                if len(end) > 3 and text.rstrip().endswith(end):
                    return end
        return None

    def _chat(self, template: ChatTemplate, messages: list[Message], tools: list[Tool] | None) -> str:
        """The rendering of a prompt. Raises RenderingError where it has not all of it."""
        shown, offered = self.with_system(self._encoder.protect(messages)), self._encoder.protect(tools)
        text = template.render(shown, offered, generation_prompt=True)
        if self._encoder.is_cut(text):
            raise RenderingError("the template cuts the text at a special token that a message holds")
        missing = left_out_words(text, shown, offered) or left_out_field(template, shown, offered, None)
        if missing is not None:
            raise RenderingError(f"the template leaves out {missing}")
        return text

    def _plain(self, candidate: Candidate, messages: list[Message]) -> str:
        if candidate.tools or any(message.get("tool_calls") for message in messages):
            raise MessageError("tools need a chat template")
        return self._separator.join([*(message["content"] for message in self.with_system(messages)), ""])
