"""A response whose tokens are another policy's: what of this policy's context stands around them."""

from __future__ import annotations

from grape_service.models.vocabulary import Vocabulary
from grape_service.render.conversation import Lead, repeated
from grape_service.render.encoding import Ids
from grape_service.render.layout import SequencePlan, Span, TextBatch
from grape_service.render.recorded import RecordedResponses
from grape_service.render.template import ChatTemplate
from grape_service.rows.candidate import Candidate, Message, Rejection, Rendered
from grape_service.rows.messages import only_text


class SharedResponses:
    """Contexts of one policy around tokens that another policy's rendering has loss on."""

    def __init__(self, template: ChatTemplate | None, vocabulary: Vocabulary, recorded: RecordedResponses):
        self._template, self._vocabulary, self._recorded = template, vocabulary, recorded

    def context(
        self, answer: str | list[Message], prompt: int, written: Ids, batch: TextBatch, is_prefilled: bool = False
    ) -> int:
        """The index of the context before a response.

        What the other's generation prompt holds already, such as <think>, is not among the tokens; what this one's
        holds and is among them is left out here. `is_prefilled`: the prompt ends with a prefill, and is all that
        stands before the response.
        """
        text, before = only_text(answer), batch.contexts[prompt]
        if self._template is None or text is None:
            return prompt
        tail, again = ("", "") if is_prefilled else repeated(before, text)
        lead = Lead() if again or is_prefilled else self._template.frame.lead(text)
        own = lead.behind(before)
        if not again and own == before and int(self._vocabulary.num_bytes([written])[0]) >= len(text.encode()):
            return prompt  # as nearly always: the tokens hold all of the response
        stated = b"".join(part or b"" for part in self._vocabulary.bytes_of(written.tolist())).decode(errors="replace")
        dropped = text[: -len(stated)] if len(stated) < len(text) and text.endswith(stated) else ""
        if dropped and not again:
            return batch.add_context(own + dropped)
        if again and not dropped and stated.startswith(again):
            return batch.add_context(before.removesuffix(tail))
        if own != before and not (lead.header and stated.startswith(lead.header)):
            return batch.add_context(own)
        return prompt

    def around_masked(
        self,
        candidate: Candidate,
        target: Rendered,
        prompt: int,
        read: list[Ids],
        spans: list[Span],
        batch: TextBatch,
        is_prefilled: bool = False,
    ) -> SequencePlan | Rejection:
        """What another policy wrote and, between, read, as it was recorded under a response_mask."""
        ids = target.input_ids[target.prompt_len :]
        if not self._vocabulary.knows(ids).all() or not self._recorded.says(ids, str(candidate.response)):
            return Rejection("rendering cannot be split", "what was read between has other tokens for this policy")
        context = self.context(candidate.response, prompt, ids, batch, is_prefilled)
        return SequencePlan([context, *read[1:]], spans)
