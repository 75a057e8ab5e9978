"""Recorded responses: token ids that a policy sampled, with its log-probabilities, proved against the response.

What rollouts put around a response is cut where it is certain, and lists of log-probabilities and masks in step:
padding, a prompt in front, what stands behind the turn end, a beginning that the generation prompt holds already. The
ids that are left have to decode to the response, or the row is rejected with what both say.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from grape_service.models.vocabulary import Vocabulary
from grape_service.render.conversation import TAG_STARTS, repeated
from grape_service.render.encoding import MARK_CLOSE, MARK_OPEN, Ids, same_words
from grape_service.render.layout import SequencePlan, Span
from grape_service.rows.candidate import Candidate, Message, Rejection
from grape_service.rows.columns import LOSS_NONE, LOSS_TOKEN, LOSS_TURN_END
from grape_service.rows.messages import THOUGHTS, only_text

UNKNOWN = -9999.0
"""Log-probabilities from here down stand for one that is not known: OpenAI's and vLLM's -9999, TRL's -1e30, -inf."""
ROUNDING = 1e-3
"""Log-probabilities above 0 by less are 0, rounded."""
SHOWN = 40

Float32s = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


class RecordedResponses:
    """Turns the recorded ids of candidates into plans, for one policy."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        control_ids: Iterable[int],
        stop_ids: frozenset[int],
        turn_end_id: int | None,
        pad_id: int | None,
        bos: str,
        unicode_forms: list[str],
    ):
        """`control_ids` are special tokens other than those around thoughts; `bos` may be missing from a prompt."""
        self._vocabulary = vocabulary
        self._stop_ids, self._turn_end_id, self._pad_id = stop_ids, turn_end_id, pad_id
        self._bos, self._unicode_forms = bos, unicode_forms
        self._is_control = _flags({*control_ids, *stop_ids}, vocabulary.size)
        self._is_stop = _flags(stop_ids, vocabulary.size)
        self._is_tail = _flags({*stop_ids, *([] if pad_id is None else [pad_id])}, vocabulary.size)

    def plan(self, candidate: Candidate, before: str, prompt: int) -> SequencePlan | Rejection:
        """The recorded response behind `before`, the text of its generation prompt, which is the batch's `prompt`."""
        try:
            return self._plan(candidate, before.replace(MARK_OPEN, "").replace(MARK_CLOSE, ""), prompt)
        except _Mismatch as error:
            return error.rejection

    def say_responses(self, candidates: Iterable[Candidate]) -> None:
        """Give candidates of which there are ids alone what these say, without control tokens, as their response."""
        for candidate in candidates:
            if candidate.response == "" and candidate.response_ids:
                with contextlib.suppress(_Mismatch):  # which is the row's rejection
                    ids = self._valid(candidate.response_ids)
                    said = self._vocabulary.spelled(ids[~self._is_control[ids]])[0]
                    candidate.response = said.decode(errors="replace")

    def says(self, ids: Ids, response: str) -> bool:
        """Whether ids decode to a response."""
        said, text = self._said(ids), response.strip()
        return self._same(said, text) or self._same(self._said(ids[~self._is_control[ids]]), text)

    def _plan(self, candidate: Candidate, before: str, prompt: int) -> SequencePlan | Rejection:
        ids = self._valid(candidate.response_ids)
        mask = _mask(candidate.response_mask, len(ids))
        if isinstance(candidate.response, list) and len(candidate.response) != 1 and mask is None:
            return Rejection(
                "rendering cannot be split", "response_ids of several messages need a response_mask that says which"
            )
        values = _values(candidate.recorded_logprobs)
        start, end = self._exact(ids, candidate) or self._cut(ids, before, candidate)
        if mask is None and self._is_stop[ids[start:end]].any():
            raise _Mismatch(OTHER_TEXT, "they go on behind a turn end: say in response_mask what the policy wrote")
        turn_end, is_recorded = self._turn_end(ids, end, mask, values, candidate.truncated)
        logprobs = None
        if values is not None:
            one_more = int(turn_end is not None)
            logprobs = _aligned(values, len(ids), start, end, one_more, is_recorded, mask)
        return self._pieces(ids[start:end], None if mask is None else mask[start:end], turn_end, logprobs, prompt)

    def _pieces(
        self, ids: Ids, mask: Bools | None, turn_end: int | None, logprobs: Float32s | None, prompt: int
    ) -> SequencePlan | Rejection:
        """`logprobs` [N] of the ids, or [N + 1] with the turn end's."""
        if mask is None or mask.all():
            return SequencePlan([prompt], [Span(ids=ids, turn_end=turn_end)], _at_most_0(logprobs))
        if not mask.any():
            return Rejection("no loss in the response", "its response_mask is 0 everywhere")
        if not mask[-1]:  # what stands behind the last token with loss changes nothing
            length = int(np.flatnonzero(mask)[-1]) + 1
            ids, mask, turn_end = ids[:length], mask[:length], None
            logprobs = None if logprobs is None else logprobs[:length]
        with_loss = mask if turn_end is None else np.append(mask, True)
        recorded = None if logprobs is None else _at_most_0(logprobs[with_loss])
        kind = np.where(mask & self._is_stop[ids], LOSS_TURN_END, np.where(mask, LOSS_TOKEN, LOSS_NONE))
        is_end = kind == LOSS_TURN_END
        bounds = np.flatnonzero((np.diff(kind) != 0) | is_end[1:] | is_end[:-1]) + 1
        contexts: list[int | Ids] = [prompt]
        spans = [Span(ids=ids[:0])]
        read = ids[:0]
        for first, last in itertools.pairwise([0, *bounds.tolist(), len(ids)]):
            if kind[first] == LOSS_NONE:
                read = ids[first:last]
            elif is_end[first] and not len(read) and spans[-1].turn_end is None:
                spans[-1].turn_end = int(ids[first])
            else:
                contexts.append(read)
                spans.append(
                    Span(ids=ids[:0], turn_end=int(ids[first])) if is_end[first] else Span(ids=ids[first:last])
                )
                read = ids[:0]
        spans[-1].turn_end = turn_end if spans[-1].turn_end is None else spans[-1].turn_end
        return SequencePlan(contexts, spans, recorded)

    # What the ids are

    def _valid(self, values: Any) -> Ids:
        """The ids as int32 [N], each of them a token."""
        ids = np.asarray(values)
        if ids.size == 0:
            raise _Mismatch("empty response", "response_ids are empty")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise _Mismatch("response_ids are not integers", None)
        unknown = ids[~self._vocabulary.knows(ids)]
        if len(unknown):
            raise _Mismatch("token id outside the vocabulary", f"{unknown[0]} is not a token of the policy")
        return ids.astype(np.int32)

    def _exact(self, ids: Ids, candidate: Candidate) -> tuple[int, int] | None:
        """From where to where ids say the response, where nothing but a turn end is around it, as nearly always."""
        text, num_tail = only_text(candidate.response), int(np.count_nonzero(self._is_tail[ids]))
        if not text or text.lstrip()[:1] in TAG_STARTS or num_tail > int(self._is_tail[ids[-1]]):
            return None
        end = len(ids) - num_tail
        return (0, end) if self._vocabulary.spelled(ids[:end])[0] == text.encode(errors="replace") else None

    def _cut(self, ids: Ids, before: str, candidate: Candidate) -> tuple[int, int]:
        """From where to where ids say the response, without what is around it. Raises _Mismatch."""
        start, end = self._words(ids)
        start = self._after_prompt(ids, start, end, before, only_text(candidate.response))
        start += self._num_repeated(ids[start:end], before)
        if start >= end:
            raise _Mismatch("empty response", "response_ids hold nothing but control tokens")
        self._refuse_other_text(ids[start:end], before, candidate)
        return start, end

    def _words(self, ids: Ids) -> tuple[int, int]:
        """From where to where ids are more than padding, turn ends and white space behind them."""
        tail = self._is_tail[ids]
        start = 0 if not tail[0] else int(np.argmin(np.append(tail, False)))
        if start == len(ids):
            raise _Mismatch("empty response", "response_ids hold a turn end and nothing else")
        found = np.flatnonzero(tail[start:]) + start
        if not len(found):
            return start, len(ids)
        data, offsets = self._vocabulary.spelled(ids)
        behind = len(ids)
        for place in found[::-1].tolist():  # from the end, as long as white space alone stands behind it
            if data[offsets[place + 1] : offsets[behind]].strip():
                break
            behind = place
        return start, behind

    def _after_prompt(self, ids: Ids, start: int, end: int, before: str, response: str | None) -> int:
        """Where the response begins: behind the rendered prompt, where the ids have it in front."""
        data, offsets = self._vocabulary.spelled(ids[start:end])
        if response is not None and data.startswith(response.encode(errors="replace")):
            return start
        for prompt in (before, before.removeprefix(self._bos)):
            if prompt and data.startswith(encoded := prompt.encode(errors="replace")):
                return start + _token_at(offsets, len(encoded))
        return start

    def _num_repeated(self, ids: Ids, before: str) -> int:
        """Tokens at the beginning that the generation prompt ends with already, such as <think>."""
        data, offsets = self._vocabulary.spelled(ids)
        again = repeated(before, data[:1000].decode(errors="ignore"))[1]
        return _token_at(offsets, len(again.encode())) if again else 0

    def _refuse_other_text(self, ids: Ids, before: str, candidate: Candidate) -> None:
        """Raises _Mismatch for ids that do not decode to the response."""
        text = only_text(candidate.response)
        if text is not None:
            text = text.removeprefix(repeated(before, text)[1])
            if not self.says(ids, text):
                raise _Mismatch(OTHER_TEXT, _both(self._said(ids), text))
            return
        said = _letters(self._said(ids))
        messages = candidate.response if isinstance(candidate.response, list) else []
        for part in (part for message in messages for part in _parts(message)):
            if _letters(part) not in said:
                raise _Mismatch(OTHER_TEXT, f"they say {self._said(ids)[:SHOWN]!r} and not {part[:SHOWN]!r}")

    def _said(self, ids: Ids) -> str:
        return self._vocabulary.spelled(ids)[0].decode(errors="replace").strip()

    def _same(self, said: str, text: str) -> bool:
        """Whether both are the same words; a character that was cut in its middle may be left out."""
        return said == text or same_words(said.rstrip("\ufffd"), text.rstrip("\ufffd"), self._unicode_forms)

    def _turn_end(
        self, ids: Ids, end: int, mask: Bools | None, values: Float32s | None, truncated: bool
    ) -> tuple[int | None, bool]:
        """The turn end with loss, and whether it is among the ids, at `end`."""
        added = None if truncated else self._turn_end_id
        if end == len(ids):
            return (None if mask is not None and not mask[end - 1] else added), False
        first = int(ids[end])
        if mask is not None and not mask[end]:
            is_padding = first == self._pad_id and mask[end - 1] and (ids[end:] == first).all()
            return (added, False) if is_padding and first != self._turn_end_id and len(ids) > end + 1 else (None, False)
        if first not in self._stop_ids:
            return added, False
        is_padding = first == self._pad_id != self._turn_end_id and (truncated or end + 1 < len(ids))
        if is_padding and truncated:
            return None, False
        if is_padding and values is not None and len(values) == len(ids) and not values[end:].any():
            return added, False
        return first, True


OTHER_TEXT = "response_ids are not the response"


class _Mismatch(Exception):
    def __init__(self, reason: str, detail: str | None):
        super().__init__(reason)
        self.rejection = Rejection(reason, detail)


def logprobs_mismatch(detail: str) -> Rejection:
    """The rejection of a row whose recorded log-probabilities are not those of its ids."""
    return Rejection("recorded log-probabilities do not match response_ids", detail)


def _flags(ids: Iterable[int], size: int) -> Bools:
    flags = np.zeros(size, dtype=bool)
    flags[[id_ for id_ in ids if 0 <= id_ < size]] = True
    return flags


def _token_at(offsets: npt.NDArray[np.int64], place: int) -> int:
    """Which token begins at a place in the text. Raises _Mismatch in the middle of one."""
    token = int(np.searchsorted(offsets, place))
    if offsets[token] != place:
        raise _Mismatch(OTHER_TEXT, "a token stands across the end of the prompt and the beginning of the response")
    return token


def _mask(values: Any, num_ids: int) -> Bools | None:
    """A response_mask as bool [num_ids]. Raises _Mismatch for one that is of other ids."""
    if values is None:
        return None
    mask = np.asarray(values)
    if mask.shape != (num_ids,):
        raise _Mismatch("response_mask does not match response_ids", f"{mask.size} values for {num_ids} ids")
    if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise _Mismatch("response_mask does not match response_ids", "a value is not 0 or 1")
    return mask.astype(bool)


def _values(values: Any) -> Float32s | None:
    """Recorded log-probabilities as float32, NaN where they are not known."""
    if values is None:
        return None
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise _Mismatch(LOGPROBS, "they are not all numbers") from None
    if found.ndim != 1:
        raise _Mismatch(LOGPROBS, "they are not one number for each id")
    return np.where(found <= UNKNOWN, np.nan, found).astype(np.float32)


LOGPROBS = "recorded log-probabilities do not match response_ids"


def _aligned(
    values: Float32s, num_ids: int, start: int, end: int, one_more: int, is_recorded: bool, mask: Bools | None
) -> Float32s:
    """Of recorded values those of ids [start, end), and of the turn end where there is one (NaN: not recorded).

    `values` may be as long as all ids, as those behind the prompt, or as what was written, with the turn end's or
    without; with a value that is not known in front, as the first token of a prompt has it, they are one longer.
    """
    num_written, number = end - start, len(values)
    if mask is not None and number == int(mask.sum()) != num_ids:  # of what the policy wrote alone
        spread = np.full(num_ids, np.nan, np.float32)
        spread[mask] = values
        values, number = spread, num_ids
    unknown = np.full(1, np.nan, np.float32)
    if number == num_ids:
        found = values[start : end + (one_more and is_recorded)]
    elif number in (num_ids - start, num_written + (one_more and is_recorded)):
        found = values[: num_written + (one_more and is_recorded)]
    elif number == num_written:
        found = values
    elif number == num_written + (one_more and is_recorded) + 1 and np.isnan(values[0]):
        found = values[1:]
    elif number == num_written + 1 and one_more and not is_recorded:
        found = values  # the server left the turn end out of the ids
    else:
        raise _Mismatch(LOGPROBS, f"{number} values for {num_ids} ids")
    if (found > ROUNDING).any():
        raise _Mismatch(LOGPROBS, "a value is above 0")
    return np.concatenate([found, unknown]) if len(found) < num_written + one_more else found


def _at_most_0(values: Float32s | None) -> Float32s | None:
    return None if values is None else np.minimum(values, 0)


def _parts(message: Message) -> list[str]:
    """Texts of a message that its tokens have to say."""
    parts = [message.get("content"), *(message.get(name) for name in THOUGHTS)]
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        arguments = function.get("arguments")
        parts.append(function.get("name"))
        parts += _leaves(arguments) if isinstance(arguments, dict | list) else []
    return [part for part in parts if isinstance(part, str)]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (str(key), *_leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, str) and value.isalnum() else []


def _letters(text: str) -> str:
    return "".join(text.split())


def _both(said: str, text: str) -> str:
    """What ids and response say, from a little before where they part."""
    text = text.strip()
    place = next((i for i, (a, b) in enumerate(zip(said, text, strict=False)) if a != b), min(len(said), len(text)))
    place = max(0, place - SHOWN // 4)
    return f"they say {said[place : place + SHOWN]!r} where the response says {text[place : place + SHOWN]!r}"
