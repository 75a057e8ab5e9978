"""Responses of several messages to plans: what a template renders of them, split into what was read and written."""

from __future__ import annotations

import re

from grape_service.render.encoding import Encoder, is_encodable
from grape_service.render.layout import SequencePlan, TextBatch, trajectory_problem
from grape_service.render.messages import MessageError, MessageForm, written_texts
from grape_service.render.prefill import Prefills
from grape_service.render.prompts import PromptTexts
from grape_service.render.sandbox import RenderingError
from grape_service.render.template import ChatTemplate
from grape_service.render.trajectory import SplitError, plan_turns, split_trajectory
from grape_service.rows.candidate import Candidate, Message, Rejection
from grape_service.rows.control_tokens import spelled_token
from grape_service.rows.prefill import prefill_of, whole_turn, without_prefill


class Trajectories:
    """Plans of responses that are messages, under one policy."""

    def __init__(
        self,
        template: ChatTemplate | None,
        form: MessageForm,
        texts: PromptTexts,
        prefills: Prefills,
        encoder: Encoder,
        turn_ends: re.Pattern[str] | None,
        turn_end_id: int | None,
        id_of_stop: dict[str, int],
    ):
        """`turn_ends` finds the texts of stop tokens, `id_of_stop` names their ids; `turn_end_id` ends a last turn that
        the template leaves without one."""
        self._template, self._form, self._texts, self._prefills = template, form, texts, prefills
        self._encoder, self._turn_ends = encoder, turn_ends
        self._turn_end_id, self._id_of_stop = turn_end_id, id_of_stop

    def plan(
        self, candidate: Candidate, response: str | list[Message], prompt: int, batch: TextBatch
    ) -> SequencePlan | Rejection:
        """The plan of a response behind the batch's `prompt`, whose text ends with its generation prompt."""
        assert isinstance(response, list), "text is planned elsewhere"
        problem = trajectory_problem(response)
        if problem is not None:
            return problem
        if self._template is None:
            return Rejection("messages need a chat template")
        prefill, whole = prefill_of(candidate.prompt), response
        given: str | Rejection | None = None
        if prefill is not None:
            given, whole = self._prefills.context(candidate, batch.contexts[prompt]), whole_turn(prefill, response)
        if isinstance(given, Rejection):
            return given
        try:
            turns = split_trajectory(
                self._template,
                self._texts.with_system(self._encoder.protect(self._form.prompt(without_prefill(candidate.prompt)))),
                self._encoder.protect(self._form.messages(whole)),
                self._encoder.protect(candidate.tools),
                self._turn_ends,
                batch.contexts[prompt],
                given,
            )
        except (MessageError, RenderingError) as error:
            return Rejection("response cannot be rendered", str(error))
        except SplitError as error:
            return Rejection("rendering cannot be split", f"{error}{self._form.hint(response)}")
        if not turns:
            return Rejection("no loss in the response", "each of its messages has weight 0")
        if not all(turn.written for turn in turns):
            return Rejection("empty response", "an assistant message of the response is empty")
        if not all(is_encodable(turn.context) and is_encodable(turn.written) for turn in turns):
            return Rejection("not UTF-8", "the response holds a lone surrogate")
        if any(self._encoder.is_cut(turn.context) or self._encoder.is_cut(turn.written) for turn in turns):
            return Rejection("rendering cannot be split", "the template cuts the text at a special token in a message")
        for text in written_texts(response):
            if (spelled := spelled_in(text, self._encoder)) is not None:
                return spelled
        return plan_turns(turns, batch, prompt, self._turn_end_id, self._id_of_stop, candidate.truncated)


def spelled_in(text: str, encoder: Encoder) -> Rejection | None:
    """The rejection of a response that spells control tokens, of this tokenizer or another, where there are any."""
    token = encoder.first_special(text) or spelled_token(text)
    return None if token is None else Rejection("response spells a control token", f"it holds '{token}' as text")
