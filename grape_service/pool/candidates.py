"""Pool rows to candidates: renamed columns, lists of responses, ids given or derived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import orjson

from grape_service.config.policy import RecordedBehavior
from grape_service.config.schema import Config
from grape_service.json_types import JsonObject
from grape_service.pool.answers import as_answered
from grape_service.pool.contract import FileContract
from grape_service.pool.elements import dealt_lists, element_of
from grape_service.pool.files import PoolFile
from grape_service.pool.filters import MISSING, passes, value_at
from grape_service.pool.finish_reasons import is_truncation, reason_in, reason_of
from grape_service.pool.layout import DEALT_NAMES, PROMPT_KEY, RESPONSE_COLUMN, RESPONSE_KEY, Layout
from grape_service.pool.lines import beginning
from grape_service.pool.meanings import Unread
from grape_service.pool.messages import (
    MISSING_RESPONSE,
    Unusable,
    characters_of,
    conversation_of,
    parsed_json,
    prompt_messages,
    refuse_another_response,
    response_of,
    tools_of,
    with_ignored,
    with_system_prompt,
    without_nulls,
)
from grape_service.pool.outcomes import TRUNCATED, Accepted, Filtered, Rejected
from grape_service.pool.prefills import behind_prefill, with_prefill
from grape_service.pool.recorded_forms import RECORDED, mask_of, recorded_values, sglang_fields
from grape_service.pool.rollouts import RECORDED_BY
from grape_service.pool.shapes import find_layout, flat
from grape_service.pool.values import (
    SAMPLING_KEYS,
    lift,
    numbers,
    sampling_settings,
    template_variables,
    text_value,
    with_thoughts,
)
from grape_service.rows.candidate import TEMPLATE_KWARGS, Candidate, Message, Rejection, Row, Tool
from grape_service.rows.columns import OUR_COLUMNS
from grape_service.rows.keys import candidate_id_of, prompt_id_of

CONSTANT_SOURCE = "\0source"
"""Under which a row has the source of its group of files."""


@dataclass(slots=True)
class _Prompt:
    """What the candidates of one prompt share."""

    messages: list[Message]
    tools: list[Tool] | None
    template_kwargs: JsonObject | None
    digest: str
    characters: int


def recorded_columns(config: Config) -> set[str]:
    """The pool's columns with log-probabilities recorded at sampling time."""
    behavior = config.behavior
    columns = {RECORDED}
    if behavior is not None and behavior.column is not None:
        columns.add(behavior.column)
    for of_source in (behavior.sources or {}).values() if behavior is not None else ():
        if isinstance(of_source, RecordedBehavior):
            columns.add(of_source.column)
    return {str(group.columns.get(column, column)) for column in columns for group in config.pool.groups}


class Normaliser:
    """Makes candidates of rows of one file of a pool, under the names that the config gives and the file shows."""

    def __init__(self, config: Config, contract: FileContract | None = None, file: PoolFile | None = None):
        """`contract` is that of the file's rows; without one, each row is looked at by itself."""
        self.group = config.pool.groups[file.group if file is not None else 0]
        self.where = self.group.where
        self.truncated = config.pool.truncated
        self._ignored = frozenset(config.pool.messages.ignore)
        self._has_structs = file is not None and file.format in (".parquet", ".arrow")
        self.folders = dict(file.folders) if file is not None else {}
        behavior = config.behavior
        self._behavior_of_source = (behavior.sources if behavior is not None else None) or {}
        self._behavior_of_all = None if behavior is None or behavior.sources else behavior.of_source(None)
        self._recorded = recorded_columns(config)
        self._contract = contract
        self._gathers = config.gather is not None
        self.filter_columns_seen = {condition.column: 0 for condition in self.where}
        """How many candidates had each column that pool.where names."""
        self.element_names: set[str] = set()
        """Names of fields of responses that are objects."""
        self.unread = Unread(prompts_alone=self.group.shape == "prompts")
        self._last_given: tuple[Any, ...] | None = None
        self._last_prompt: _Prompt
        if contract is not None:
            self._use(contract.layout)

    def _use(self, layout: Layout) -> None:
        self.layout = layout
        self._theirs = dict(layout.theirs)
        if self.group.source is not None:
            self._theirs["source"] = CONSTANT_SOURCE
        self._dotted = sorted({name for name in self._theirs.values() if "." in name})
        extra = (layout.conversation, layout.input, *layout.columns)
        self._taken = frozenset(self._theirs.values()) | self._recorded | {name for name in extra if name is not None}
        self._taken -= {self._theirs["sampling"]} - {"sampling"}
        self._lists = {self._theirs["response_ids"], *self._recorded}
        self._dealt_names = {self._theirs[name] for name in DEALT_NAMES} | set(layout.dealt)
        self._where = [
            condition.model_copy(update={"column": self._filtered_column(condition.column)}) for condition in self.where
        ]
        self._is_plain = layout.shape == "response" and not (self._dotted or self.folders or layout.input)
        self._is_plain = self._is_plain and self.group.source is None

    def _look_at(self, fields: Row) -> None:
        """See what of a row, or of a response that is an object, means something and is not read."""
        if not fields.keys() <= self.unread.names:
            read = self._taken | {condition.column for condition in self._where} | set(self.group.carry)
            read |= {name.split(".")[0] for name in self._dotted}
            self.unread.notice(fields.keys() - self.unread.names, read)
        if self.unread.meant:
            self.unread.look(fields)

    def _filtered_column(self, name: str) -> str:
        """The column that a filter means: one of our names is the column that holds it, pool_name a column that has
        our name and is not ours."""
        if name in self._theirs and name not in self.group.carry:
            return self._theirs[name]
        plain = name.removeprefix("pool_")
        return plain if plain != name and name not in self.layout.names and plain in OUR_COLUMNS else name

    def columns_read(self) -> set[str]:
        """Names of the columns that have a meaning, or are filtered by."""
        filtered = {condition.column for condition in self._where}
        return {*self._theirs.values(), *self.layout.columns, *filtered, self.layout.conversation or ""}

    def candidates(self, row: Row) -> Iterator[Accepted | Filtered | Rejected]:
        """The candidates of one row; a row that is unusable as a whole gives one Rejected."""
        if self._contract is None:
            self._use(find_layout([row], self.group, self.folders))
        elif (problem := self._contract.problem(row)) is not None:
            yield self._rejected(row, problem)
            return
        self._look_at(row)
        if self.group.shape == "prompts":
            yield self._prompt_alone(row)
            return
        if self._is_plain and self._theirs["responses"] not in row:
            yield self._checked(row, {})
            return
        try:
            row = self._under_layout(row)
            elements = self._responses(row)
        except Unusable as error:
            yield Filtered() if self._is_prompt(error.rejection) else self._rejected(row, error.rejection)
            return
        if elements is None:
            yield self._checked(row, {})
            return
        for element in elements:
            yield self._checked(row, element)

    def _is_prompt(self, rejection: Rejection) -> bool:
        """Whether a row without a response is what gather samples for, and no damaged candidate."""
        return self._gathers and rejection.reason == MISSING_RESPONSE

    def _under_layout(self, row: Row) -> Row:
        """A row with the columns that its layout, its folder and its group give it, and its prompt in one of them.
        Raises Unusable."""
        layout = self.layout
        row = {**self.folders, **row} if self.folders else dict(row)
        if self.group.source is not None:
            row[CONSTANT_SOURCE] = self.group.source
        for name in self._dotted:
            lift(row, name)
        for name in layout.json_text:
            if isinstance(row.get(name), str) and (parsed := parsed_json(row[name])) is not None:
                row[name] = parsed
        if layout.conversation is not None:
            prompt, response = conversation_of(row.get(layout.conversation))
            row |= {PROMPT_KEY: prompt, RESPONSE_KEY: response}
            if "response" not in self.group.carry:
                refuse_another_response(row.get("response"), response)
        if layout.input is not None and (more := row.get(layout.input)) is not None:
            text = row.get(self._theirs["prompt"])
            if not isinstance(more, str) or not isinstance(text, str):
                raise Unusable("prompt has the wrong type", f"'{layout.input}' continues it, and one is no text")
            row[self._theirs["prompt"]] = f"{text}\n\n{more}" if more.strip() else text
        return row

    def _responses(self, row: Row) -> list[Row] | None:
        """What the responses of a row have of their own; None where it has one. Raises Unusable."""
        layout = self.layout
        if layout.conversation is not None:
            return None
        if layout.columns:
            given = [name for name in layout.columns if row.get(name) is not None]
            elements: list[Row] = [{RESPONSE_KEY: row[name], RESPONSE_COLUMN: name} for name in given]
            for name, of_source in zip(layout.columns, layout.column_sources, strict=False):
                for element in elements:
                    if element[RESPONSE_COLUMN] == name:
                        element[self._theirs["source"]] = row.get(of_source)
            if not elements:
                raise Unusable(MISSING_RESPONSE, f"none of {', '.join(layout.columns)} has one")
            return elements
        responses = row.get(self._theirs["responses"])
        if responses is None:
            return None
        if row.get(self._theirs["response"]) is not None:
            raise Unusable("both response and responses")
        if not isinstance(responses, list):
            raise Unusable("responses are not a list")
        if not responses:
            raise Unusable(MISSING_RESPONSE, "responses is an empty list")
        responses = flat(responses)
        if self._theirs["prompt"] != PROMPT_KEY:
            prompt_messages(row.get(self._theirs["prompt"]))
        dealt = dealt_lists(row, len(responses), self._dealt_names, self._lists, layout)
        return [
            {**{name: values[place] for name, values in dealt.items()}, **self._element(response)}
            for place, response in enumerate(responses)
        ]

    def _element(self, response: Any) -> Row:
        """One of `responses` under the pool's names."""
        if isinstance(response, dict):
            self.element_names.update(response)
            self._look_at(response)
        return element_of(response, self._theirs, self.group.carry)

    def _prompt_alone(self, row: Row) -> Accepted | Rejected:
        """The prompt of a row as a candidate without a response; what the row says of responses is left out."""
        try:
            fields = self._under_layout(row)
            self.unread.refuse_media(fields)
            prompt = self._prompt(fields)
            if self.unread.media:
                self.unread.refuse_placeholders(prompt.messages)
            prompt_id = text_value(fields.get(self._theirs["prompt_id"]), "prompt_id") or prompt.digest
        except Unusable as error:
            return self._rejected(row, error.rejection)
        left_out = {*self._taken, *self.layout.dealt, *self.layout.columns}
        other = {name: value for name, value in fields.items() if name not in left_out}
        digest, kwargs = candidate_id_of(prompt.digest, None, ""), prompt.template_kwargs
        other |= {} if kwargs is None else {TEMPLATE_KWARGS: kwargs}
        candidate = Candidate(
            prompt.messages, "", prompt_id, digest, tools=prompt.tools, template_kwargs=kwargs, other=other
        )
        return Accepted(candidate, prompt.digest, digest, prompt.characters)

    def _checked(self, row: Row, element: Row) -> Accepted | Filtered | Rejected:
        fields = {**row, **element} if element else row
        if self.where:
            for condition, own in zip(self._where, self.where, strict=True):
                self.filter_columns_seen[own.column] += value_at(fields, condition.column) is not MISSING
        try:
            if self._where and not passes(fields, self._where):
                return Filtered()
            return self._accepted(fields)
        except Unusable as error:
            return Filtered() if self._is_prompt(error.rejection) else self._rejected(fields, error.rejection)

    def _rejected(self, fields: Row, rejection: Rejection) -> Rejected:
        ids = [fields.get(self._theirs[name]) for name in ("prompt_id", "candidate_id")]
        prompt_id, candidate_id = (str(id_) if isinstance(id_, str | int) else None for id_ in ids)
        shown = [value for name, value in fields.items() if not name.startswith("\0")] or [""]
        texts = (fields.get(self._theirs["response"]), fields.get(self._theirs["prompt"]), shown[0])
        text = next(value for value in texts if value is not None) if any(v is not None for v in texts) else ""
        text = text if isinstance(text, str) else orjson.dumps(text, default=str).decode()
        return Rejected(replace(rejection, text=beginning(text)), prompt_id, candidate_id)

    def _accepted(self, fields: Row) -> Accepted:
        theirs, get = self._theirs, fields.get
        if self.unread.media:
            self.unread.refuse_media(fields)
        if get("meta_info") is not None:
            fields = {**fields, **sglang_fields(fields, theirs)}
            get = fields.get
        answer = get(theirs["response"])
        whole = None
        if not isinstance(answer, str) or answer.lstrip()[:1] in ("[", "{") or theirs["prompt"] == PROMPT_KEY:
            given = get(theirs["prompt"])
            if self._has_structs:
                answer, given = without_nulls(answer), without_nulls(given)
            answer, finish, whole = as_answered(answer, given)
            if finish is not None and get(theirs["finish_reason"]) is None:
                fields = {**fields, theirs["finish_reason"]: finish}
                get = fields.get
        prompt = self._prompt(fields, whole)
        if self.unread.media:
            self.unread.refuse_placeholders(prompt.messages)
        ids = get(theirs["response_ids"])
        is_told = answer != "" or not ids or RECORDED_BY not in fields
        response = with_ignored(response_of(answer), self._ignored) if is_told else ""
        if whole is not None or self.layout.conversation is not None:
            response = behind_prefill(prompt.messages, response)
        thoughts = get(theirs["reasoning"])
        if thoughts is not None:
            response = with_thoughts(response, thoughts, theirs["reasoning"])
        source = text_value(get(theirs["source"]), "source")
        finish_reason = None if (finish := get(theirs["finish_reason"])) is None else reason_of(finish)
        finish_reason = reason_in(fields, finish_reason, self.group.carry)
        truncated = is_truncation(finish_reason)
        if truncated and self.truncated == "reject":
            raise Unusable(TRUNCATED, f"its finish_reason is '{finish_reason}'")
        content_digest = candidate_id_of(prompt.digest, source, response or str(ids))
        mask, logprobs = get(theirs["response_mask"]), get(self._recorded_column(source))
        mask = None if mask is None else mask_of(mask, ids)
        candidate = Candidate(
            prompt=prompt.messages,
            response=response,
            prompt_id=text_value(get(theirs["prompt_id"]), "prompt_id") or prompt.digest,
            candidate_id=text_value(get(theirs["candidate_id"]), "candidate_id") or content_digest,
            source=source,
            response_ids=None if ids is None else numbers(ids, {int}, "response_ids are not integers"),
            response_mask=mask,
            recorded_logprobs=None if logprobs is None else recorded_values(logprobs, ids, mask),
            sampling=self._sampling(fields),
            truncated=truncated,
            finish_reason=finish_reason,
            tools=prompt.tools,
            template_kwargs=prompt.template_kwargs,
            other={name: content for name, content in fields.items() if name not in self._taken},
        )
        if TEMPLATE_KWARGS in candidate.other:  # carried along, and not the variables of this row's rendering
            candidate.other[f"pool_{TEMPLATE_KWARGS}"] = candidate.other.pop(TEMPLATE_KWARGS)
        if prompt.template_kwargs is not None:
            candidate.other[TEMPLATE_KWARGS] = prompt.template_kwargs
        characters = len(response) if isinstance(response, str) else sum(map(characters_of, response))
        return Accepted(candidate, prompt.digest, content_digest, prompt.characters + characters)

    def _prompt(self, fields: Row, whole: list[Message] | None = None) -> _Prompt:
        """A row's prompt, or that of its whole conversation; the one before, where both rows have the same text. Raises
        Unusable."""
        theirs, get = self._theirs, fields.get
        beside = get(theirs["system_prompt"]), get(theirs["tools"]), get(theirs["prefill"])
        given: tuple[Any, ...] = (whole or get(theirs["prompt"]), *beside)
        if (kwargs := get(theirs[TEMPLATE_KWARGS])) is not None:
            given = (*given, kwargs)
        if given == self._last_given:
            return self._last_prompt
        text, system, tools, prefill, *kwargs = map(without_nulls, given) if self._has_structs else given
        messages = with_ignored(with_system_prompt(system, prompt_messages(text)), self._ignored)
        messages = with_prefill(messages, prefill)
        offered, variables = tools_of(tools), template_variables(*kwargs)
        digest = prompt_id_of(messages, offered, variables)
        prompt = _Prompt(messages, offered, variables, digest, sum(map(characters_of, messages)))
        if all(value is None or isinstance(value, str) for value in given):  # only texts that are equal are the same
            self._last_given, self._last_prompt = given, prompt
        return prompt

    def _sampling(self, fields: Row) -> JsonObject | None:
        """How the response was sampled: its settings in columns of their own under those of `sampling`."""
        given = fields.get(self._theirs["sampling"])
        own = None if given is None else sampling_settings(given)
        if self.unread.names.isdisjoint(SAMPLING_KEYS):
            return {**self.group.sampling, **(own or {})} or None
        named = [key for key in SAMPLING_KEYS if fields.get(key) is not None and key not in self.group.carry]
        alone = sampling_settings({key: fields[key] for key in named})
        return {**self.group.sampling, **(alone or {}), **(own or {})} or None

    def _recorded_column(self, source: str | None) -> str:
        behavior = self._behavior_of_all or (self._behavior_of_source.get(source) if source is not None else None)
        column = behavior.column if isinstance(behavior, RecordedBehavior) else RECORDED
        return self._theirs[RECORDED] if column == RECORDED else column
