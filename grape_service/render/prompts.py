"""The text of a prompt under one policy, up to where a response begins.

Where a response continues a prefill, the row's tokens are the template's rendering of the whole turn, prefill and
response in one message, cut where the prefill ends: the prompt is the tokens of everything up to there, as an engine
has them that is asked to continue the turn (`continue_final_message`), and the response the tokens that follow, as it
samples them. Where the template rewrites the turn, or writes something else before it that depends on the response,
the cut is not certain.
"""

from __future__ import annotations

from grape_service.render.conversation import ANSWER, THOUGHT_TAG
from grape_service.render.encoding import Encoder, is_encodable
from grape_service.render.fields import left_out_field, left_out_words
from grape_service.render.messages import MessageError, MessageForm
from grape_service.render.sandbox import RenderingError
from grape_service.render.template import ChatTemplate
from grape_service.rows.candidate import Candidate, Message, Rejection, Tool
from grape_service.rows.control_tokens import rendered_opening
from grape_service.rows.messages import THOUGHTS, response_messages
from grape_service.rows.prefill import prefill_of, without_prefill


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


NOT_CERTAIN = "prefill cannot be told from the response"
REPEATED = "response repeats its prefill"


class Prefills:
    """Contexts with a prefill, under one policy."""

    def __init__(self, template: ChatTemplate | None, form: MessageForm, texts: PromptTexts, encoder: Encoder):
        self._template, self._form, self._texts, self._encoder = template, form, texts, encoder
        self._last: tuple[tuple[object, ...], str | Rejection] | None = None

    def context(self, candidate: Candidate, before: str) -> str | Rejection:
        """The text of a prompt up to the end of its prefill; `before` is its rendering with the generation prompt.
        Candidates of one prompt share it."""
        asked = (before, candidate.prompt, candidate.tools)
        if self._last is None or self._last[0] != asked:
            self._last = asked, self._find(candidate, before)
        return self._last[1]

    def split(self, candidate: Candidate, before: str, response: str) -> tuple[str, str] | Rejection:
        """What stands before a response, prefill included, and what is written of it there."""
        context, prefill = self.context(candidate, before), prefill_of(candidate.prompt)
        assert prefill is not None, "only prompts that end with a prefill are split here"
        if isinstance(context, Rejection):
            return context
        if self._template is None:
            return context, response
        said = self._encoder.protect(prefill)
        whole = self._whole_turn(self._template, candidate, said + response)
        if isinstance(whole, Rejection):
            return whole
        if whole.startswith(context + response.rstrip()):
            return context, response
        if not THOUGHT_TAG.search(said):
            return Rejection(NOT_CERTAIN, "the template rewrites the turn that both are")
        own, text = self._template.frame.split(before, said + response, self._encoder.drops_space)
        if text.endswith(response):
            there, written = own + text[: len(text) - len(response)], response
        else:  # what the generation prompt ends with stands once, as <think> and the line's end behind it
            there, written = own, text
        if there != context or not response.endswith(written):
            return Rejection(NOT_CERTAIN, "the template writes something else before the turn, by what it goes on with")
        return context, written

    def _find(self, candidate: Candidate, before: str) -> str | Rejection:
        prefill = prefill_of(candidate.prompt)
        assert prefill is not None, "only prompts that end with a prefill have such a context"
        if self._template is None:
            return before + prefill
        said = self._encoder.protect(prefill)
        own, text = self._template.frame.split(before, said + ANSWER, self._encoder.drops_space)
        if not text.endswith(ANSWER):
            return Rejection(NOT_CERTAIN, "the template leaves out a part of the prefill")
        shown = text[: -len(ANSWER)]
        if THOUGHT_TAG.search(said):  # which templates move or leave out: where they do is known of the frame
            return own + shown
        whole = self._whole_turn(self._template, candidate, said + ANSWER)
        if isinstance(whole, Rejection):
            return whole
        for given in (said, said.lstrip()):
            head, found, _ = whole.rpartition(given + ANSWER)
            if found and (head + given == own + shown or _same_but_thoughts(head, before)):
                return head + given
        return Rejection(NOT_CERTAIN, "the template rewrites the prefill")

    def _whole_turn(self, template: ChatTemplate, candidate: Candidate, turn: str) -> str | Rejection:
        try:
            messages = self._encoder.protect(self._form.prompt(without_prefill(candidate.prompt)))
            messages = [*self._texts.with_system(messages), {"role": "assistant", "content": turn}]
            return template.render(messages, self._encoder.protect(candidate.tools))
        except (MessageError, RenderingError) as error:
            return Rejection("response cannot be rendered", str(error))


def _same_but_thoughts(one: str, other: str) -> bool:
    """Whether two texts differ in white space and in what opens and closes thoughts alone."""
    return "".join(THOUGHT_TAG.sub("", one).split()) == "".join(THOUGHT_TAG.sub("", other).split())


def unusable_response(candidate: Candidate) -> Rejection | None:
    """Why a response cannot continue the prefill of its prompt, if there is one: None where it may."""
    prefill = prefill_of(candidate.prompt)
    if prefill is None:
        return None
    first = response_messages(candidate.response)[0] if candidate.response else {"role": "assistant"}
    if first["role"] != "assistant" or any(first.get(name) for name in THOUGHTS):
        return Rejection(NOT_CERTAIN, "what continues it is no message of the assistant, or has thoughts of its own")
    again = prefill.strip()
    if candidate.response_ids is None and again and (first.get("content") or "").lstrip().startswith(again):
        return Rejection(REPEATED, f"both begin with {prefill[:40]!r}: a response is what follows the prefill")
    return None
