"""Responses of several messages: a template's rendering of them, split into what the policy read and what it wrote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from grape_service.render.conversation import EMPTY_THOUGHTS, ENDS_EMPTY, Lead
from grape_service.render.encoding import MARK_CLOSE, MARK_OPEN, Encoder, is_encodable
from grape_service.render.fields import left_out_field
from grape_service.render.layout import SequencePlan, Span, TextBatch, trajectory_problem
from grape_service.render.messages import MessageError, MessageForm, written_texts
from grape_service.render.prompts import Prefills, PromptTexts
from grape_service.render.sandbox import RenderingError
from grape_service.render.template import ChatTemplate
from grape_service.rows.candidate import Candidate, Message, Rejection, Tool
from grape_service.rows.control_tokens import spelled_token
from grape_service.rows.messages import THOUGHTS, has_loss, tool_names
from grape_service.rows.prefill import prefill_of, whole_turn, without_prefill


@dataclass(frozen=True)
class Turn:
    """One assistant turn: the text before it that is not part of an earlier turn, and what was written."""

    context: str
    written: str
    turn_end: str | None
    """The turn-end token's text; None where the last turn has none."""
    after: str | None = None
    """The turn end that the context follows; None where it begins the sequence."""


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
    tools: list[Tool] | None,
    turn_ends: re.Pattern[str] | None,
    rendered_prompt: str,
    given: str | None = None,
) -> list[Turn]:
    """The turns with loss of a response of assistant and tool messages, which ends with an assistant message.

    `rendered_prompt` is the prompt with its generation prompt, as it was rendered alone; `given` what the policy read
    before it went on with the first message, where that begins with a prefill. Raises SplitError; RenderingError where
    the template refuses the messages.
    """
    whole = template.render([*prompt, *response], tools)
    turns: list[Turn] = []
    position = last_seen = 0  # where the last turn ended
    after = None
    for index, message in enumerate(response):
        if message["role"] != "assistant":
            continue
        is_last = index + 1 == len(response)
        before = template.render([*prompt, *response[:index]], tools, generation_prompt=True)
        if not turns and before != rendered_prompt:
            raise SplitError("the template renders the same prompt in two ways")
        start = _start(template, before, whole, message, is_last)
        if start is None:
            reason = "does not go on where its generation prompt ends"
            if turns and not whole.startswith(before[:position]):
                raise SplitError(f"the template rewrites the turns before response message {index}")
            raise SplitError(f"response message {index} {reason}")
        begin, read = start
        context = whole[position:begin] + read
        for earlier in response[last_seen:index]:
            if earlier["content"].strip() not in context:
                raise SplitError(f"the template leaves out what is before response message {index}")
        alone = whole if is_last else template.render([*prompt, *response[: index + 1]], tools)
        written = _written_alone(template, before, alone, message, turn_ends, index)
        if EMPTY_THOUGHTS.match(written) and _thinks(message) and not EMPTY_THOUGHTS.match(message["content"]):
            raise SplitError(f"the template puts empty thoughts before those of response message {index}")
        if not whole.startswith(written, begin):
            raise SplitError(f"the template rewrites response message {index} once others follow")
        _check_complete(written, message, index)
        end = turn_ends.match(whole, begin + len(written)) if turn_ends is not None else None
        if end is None and not is_last:
            raise SplitError(f"response message {index} does not end with one turn-end token")
        turn = Turn(context, written, end[0] if end else None, after)
        turns.append(turn if turns or given is None else _behind(given, turn))
        position, after, last_seen = begin + len(written) + len(end[0] if end else ""), turn.turn_end, index + 1
    missing = left_out_field(template, [*prompt, *response], tools, len(prompt))
    if missing is not None:
        raise SplitError(f"the template leaves out {missing}")
    return _with_loss(turns, [has_loss(message) for message in response if message["role"] == "assistant"])


def _behind(given: str, turn: Turn) -> Turn:
    """The first turn without its prefill, which is a part of what the policy was given."""
    whole = turn.context + turn.written
    if not whole.startswith(given) or len(given) < len(turn.context):
        raise SplitError("what the policy read before it went on with its prefill is not in the whole conversation")
    return replace(turn, context=given, written=whole[len(given) :])


def _start(template: ChatTemplate, before: str, whole: str, message: Message, is_last: bool) -> tuple[int, str] | None:
    """Where a turn begins in the whole rendering, and what the policy reads before it that does not stand there."""
    thinks = _thinks(message)
    lead = Lead() if thinks else template.frame.plain
    if (lead.cut or lead.header) and whole.startswith(behind := lead.behind(before)):
        return len(behind), ""
    if whole.startswith(before):
        empty = None if thinks else EMPTY_THOUGHTS.match(whole, len(before))
        return (empty.end() if empty else len(before)), ""
    closed = ENDS_EMPTY.search(before)
    if closed is None or not whole.startswith(before[: closed.start()]):
        return None
    return closed.start(), closed[0] if is_last and not thinks else ""


def _thinks(message: Message) -> bool:
    return any(message.get(name) for name in THOUGHTS) or "</think>" in message["content"]


def _written_alone(
    template: ChatTemplate, before: str, alone: str, message: Message, turn_ends: re.Pattern[str] | None, index: int
) -> str:
    """What a turn wrote, from the rendering in which it is the last."""
    start = _start(template, before, alone, message, is_last=True)
    if start is None:
        raise SplitError(f"response message {index} does not go on where its generation prompt ends")
    rest = alone[start[0] :]
    ends = list(turn_ends.finditer(rest)) if turn_ends is not None else []
    if not ends:
        return rest
    if len(ends) != 1 or rest[ends[0].end() :].strip():
        raise SplitError(f"response message {index} does not end with one turn-end token")
    return rest[: ends[0].start()]


def _check_complete(written: str, message: Message, index: int) -> None:
    parts = [message["content"], *(message.get(name) or "" for name in THOUGHTS), *tool_names(message)]
    for part in parts:
        if isinstance(part, str) and part.strip() not in written:
            raise SplitError(f"the template leaves out or rewrites a part of response message {index}")


def _with_loss(turns: list[Turn], loss: Sequence[bool]) -> list[Turn]:
    """The turns with loss; those without are read, those behind the last with loss are left out."""
    kept: list[Turn] = []
    read, after = "", None
    for turn, wanted in zip(turns, loss, strict=True):
        if not read:
            after = turn.after
        if wanted:
            kept.append(replace(turn, context=read + turn.context, after=after))
            read = ""
        else:
            read += turn.context + turn.written + (turn.turn_end or "")
    return kept


def plan_turns(
    turns: list[Turn],
    batch: TextBatch,
    prompt: int,
    turn_end_id: int | None,
    id_of_stop: dict[str, int],
    truncated: bool,
) -> SequencePlan:
    """The plan of a trajectory behind the batch's `prompt`; a last turn without a turn end gets `turn_end_id`."""
    contexts: list[int] = []
    spans: list[Span] = []
    for turn in turns:
        end = turn_end_id if turn.turn_end is None else id_of_stop[turn.turn_end]
        after = None if turn.after is None else id_of_stop[turn.after]
        is_prompt = not contexts and turn.context == batch.contexts[prompt]
        contexts.append(prompt if is_prompt else batch.add_context(turn.context, after))
        spans.append(Span(batch.add_written(turn.written), is_rendered=True, turn_end=end))
    if truncated:
        spans[-1].turn_end = None
    return SequencePlan(contexts, spans)


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
