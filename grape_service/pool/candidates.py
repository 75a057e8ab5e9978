"""Pool rows to candidates: renamed columns, lists of responses, ids given or derived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from grape_service.config.policy import RecordedBehavior
from grape_service.config.schema import Config
from grape_service.pool.column_types import Kind
from grape_service.pool.files import PoolFile
from grape_service.pool.filters import MISSING, passes, value_at
from grape_service.pool.finish_reasons import is_truncation
from grape_service.pool.lines import beginning
from grape_service.pool.messages import (
    Unusable,
    conversation_of,
    parsed_json,
    prompt_messages,
    response_message,
    response_of,
    tools_of,
    with_system_prompt,
    without_nulls,
)
from grape_service.pool.shapes import (
    DEALT_NAMES,
    ELEMENT_TEXTS,
    PROMPT_KEY,
    RESPONSE_COLUMN,
    RESPONSE_KEY,
    Layout,
    find_layout,
)
from grape_service.rows.candidate import Candidate, Message, Rejection
from grape_service.rows.keys import candidate_id_of, prompt_id_of

RECORDED = "behavior_logprobs"
CONSTANT_SOURCE = "\0source"
"""Under which a row has the source of its group of files."""
TRUNCATED = "truncated"
TOO_LONG = "longer than max_tokens"
EXACT_IN_FLOAT = 2.0**53
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p")
"""What of `sampling` is kept: the settings that change probabilities."""


@dataclass
class Filtered:
    """A candidate that pool.where leaves out."""


@dataclass
class Rejected:
    """A candidate, or a whole row, that cannot be used."""

    rejection: Rejection
    prompt_id: str | None = None
    candidate_id: str | None = None


@dataclass(slots=True)
class Accepted:
    """A candidate with what it is compared by."""

    candidate: Candidate
    prompt_digest: str
    content_digest: str
    """Digest of prompt, source and response: equal for exact duplicates."""
    num_characters: int
    """Of prompt and response, about."""
    column_kinds: dict[str, Kind] = field(default_factory=dict)
    """Kinds of other columns that JSON lacks."""


@dataclass(slots=True)
class _Prompt:
    """What the candidates of one prompt share."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
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

    def __init__(self, config: Config, layout: Layout | None = None, file: PoolFile | None = None):
        """`layout` is that of the file's rows; without one, each row is looked at by itself."""
        self.group = config.pool.groups[file.group if file is not None else 0]
        self.where = self.group.where
        self.truncated = config.pool.truncated
        self._has_structs = file is not None and file.format == ".parquet"
        self.folders = dict(file.folders) if file is not None else {}
        behavior = config.behavior
        self._behavior_of_source = (behavior.sources if behavior is not None else None) or {}
        self._behavior_of_all = None if behavior is None or behavior.sources else behavior.of_source(None)
        self._recorded = recorded_columns(config)
        self._one_layout = layout is not None
        self.filter_columns_seen = {condition.column: 0 for condition in self.where}
        """How many candidates had each column that pool.where names."""
        self.element_names: set[str] = set()
        """Names of fields of responses that are objects."""
        self._last_given: tuple[Any, ...] | None = None
        self._last_prompt: _Prompt
        if layout is not None:
            self._use(layout)

    def _use(self, layout: Layout) -> None:
        self.layout = layout
        self._theirs = dict(layout.theirs)
        if self.group.source is not None:
            self._theirs["source"] = CONSTANT_SOURCE
        self._dotted = sorted({name for name in self._theirs.values() if "." in name})
        extra = (layout.conversation, layout.input, *layout.columns)
        self._taken = frozenset(self._theirs.values()) | self._recorded | {name for name in extra if name is not None}
        self._lists = {self._theirs["response_ids"], *self._recorded}
        self._dealt_names = {self._theirs[name] for name in DEALT_NAMES} | set(layout.dealt)
        self._is_plain = layout.shape == "response" and not (self._dotted or self.folders or layout.input)
        self._is_plain = self._is_plain and self.group.source is None

    def columns_read(self) -> set[str]:
        """Names of the columns that have a meaning, or are filtered by."""
        return {*self._theirs.values(), *self.layout.columns, *self.filter_columns_seen, self.layout.conversation or ""}

    def candidates(self, row: dict[str, Any]) -> Iterator[Accepted | Filtered | Rejected]:
        """The candidates of one row; a row that is unusable as a whole gives one Rejected."""
        if not self._one_layout:
            self._use(find_layout([row], self.group, self.folders))
        if self._is_plain and self._theirs["responses"] not in row:
            yield self._checked(row, {})
            return
        try:
            row, elements = self._prepared(row)
        except Unusable as error:
            yield self._rejected(row, error.rejection)
            return
        if elements is None:
            yield self._checked(row, {})
            return
        for element in elements:
            yield self._checked(row, element)

    def _prepared(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
        """A row under its layout, and what its responses have of their own where it is a list. Raises Unusable."""
        layout = self.layout
        row = {**self.folders, **row} if self.folders else dict(row)
        if self.group.source is not None:
            row[CONSTANT_SOURCE] = self.group.source
        for name in self._dotted:
            _lift(row, name)
        for name in layout.json_text:
            if isinstance(row.get(name), str) and (parsed := parsed_json(row[name])) is not None:
                row[name] = parsed
        if layout.conversation is not None:
            prompt, response = conversation_of(row.get(layout.conversation))
            row |= {PROMPT_KEY: prompt, RESPONSE_KEY: response}
            return row, None
        if layout.input is not None and isinstance(row.get(layout.input), str) and row[layout.input].strip():
            text = row.get(self._theirs["prompt"])
            row[self._theirs["prompt"]] = f"{text}\n\n{row[layout.input]}" if isinstance(text, str) else text
        if layout.columns:
            given = [name for name in layout.columns if row.get(name) is not None]
            elements: list[dict[str, Any]] = [{RESPONSE_KEY: row[name], RESPONSE_COLUMN: name} for name in given]
            if not elements:
                raise Unusable("missing response", f"none of {', '.join(layout.columns)} has one")
            return row, elements
        responses = row.get(self._theirs["responses"])
        if responses is None:
            return row, None
        if row.get(self._theirs["response"]) is not None:
            raise Unusable("both response and responses")
        if not isinstance(responses, list):
            raise Unusable("responses are not a list")
        if not responses:
            raise Unusable("missing response", "responses is an empty list")
        prompt_messages(row.get(self._theirs["prompt"]))
        dealt = self._dealt(row, len(responses))
        elements = [
            {**{name: values[place] for name, values in dealt.items()}, **self._element(response)}
            for place, response in enumerate(responses)
        ]
        return row, elements

    def _dealt(self, row: dict[str, Any], number: int) -> dict[str, list[Any]]:
        """The lists of a row that have an element for each of its responses. Raises Unusable where one that has to
        has not."""
        dealt = {}
        for name in self._dealt_names:
            values = row.get(name)
            if not isinstance(values, list):
                continue
            if name in self._lists and not isinstance((values or [None])[0], list):
                continue
            if len(values) == number:
                dealt[name] = values
            elif name in self._theirs.values() or name in self.filter_columns_seen:
                raise Unusable(
                    "a list does not match the responses", f"'{name}' has {len(values)} elements for {number} responses"
                )
        return dealt

    def _element(self, response: Any) -> dict[str, Any]:
        """One of `responses` under the pool's names: text, messages, one message, or an object with a response."""
        theirs = self._theirs["response"]
        if not isinstance(response, dict):
            return {theirs: response}
        self.element_names.update(response)
        if "message" in response and isinstance(response["message"], dict):  # a choice of a chat completion
            rest = {name: value for name, value in response.items() if name not in ("message", "index")}
            return {**self._named(rest), theirs: response_message(response["message"])}
        if "role" in response and theirs not in response and "response" not in response:
            return {theirs: response_message(response)}
        return self._named(response)

    def _named(self, element: dict[str, Any]) -> dict[str, Any]:
        """An object's fields, ours under the names that the row has for them."""
        named = {
            self._theirs[name] if name in self._theirs and self._theirs[name] not in element else name: value
            for name, value in element.items()
        }
        theirs = self._theirs["response"]
        if theirs not in named:
            text = next((name for name in ELEMENT_TEXTS if name in named), None)
            if text is not None:
                named[theirs] = named.pop(text)
        return named

    def _checked(self, row: dict[str, Any], element: dict[str, Any]) -> Accepted | Filtered | Rejected:
        fields = {**row, **element} if element else row
        if self.where:
            for column in self.filter_columns_seen:
                self.filter_columns_seen[column] += value_at(fields, column) is not MISSING
            if not passes(fields, self.where):
                return Filtered()
        try:
            return self._accepted(fields)
        except Unusable as error:
            return self._rejected(fields, error.rejection)

    def _rejected(self, fields: dict[str, Any], rejection: Rejection) -> Rejected:
        ids = [fields.get(self._theirs[name]) for name in ("prompt_id", "candidate_id")]
        prompt_id, candidate_id = (str(id_) if isinstance(id_, str | int) else None for id_ in ids)
        shown = [value for name, value in fields.items() if not name.startswith("\0")] or [""]
        texts = (fields.get(self._theirs["response"]), fields.get(self._theirs["prompt"]), shown[0])
        text = next(value for value in texts if value is not None) if any(v is not None for v in texts) else ""
        text = text if isinstance(text, str) else orjson.dumps(text, default=str).decode()
        return Rejected(replace(rejection, text=beginning(text)), prompt_id, candidate_id)

    def _accepted(self, fields: dict[str, Any]) -> Accepted:
        theirs, get = self._theirs, fields.get
        prompt = self._prompt(fields)
        answer = get(theirs["response"])
        response = response_of(without_nulls(answer) if self._has_structs else answer)
        source = _text(get(theirs["source"]), "source")
        finish_reason = get(theirs["finish_reason"])
        if finish_reason is not None and finish_reason == finish_reason and not isinstance(finish_reason, str):
            raise Unusable("finish_reason has the wrong type", f"it is a {type(finish_reason).__name__}, not text")
        truncated = is_truncation(finish_reason)
        if truncated and self.truncated == "reject":
            raise Unusable(TRUNCATED, f"its finish_reason is '{finish_reason}'")
        content_digest = candidate_id_of(prompt.digest, source, response)
        candidate = Candidate(
            prompt=prompt.messages,
            response=response,
            prompt_id=_text(get(theirs["prompt_id"]), "prompt_id") or prompt.digest,
            candidate_id=_text(get(theirs["candidate_id"]), "candidate_id") or content_digest,
            source=source,
            response_ids=_numbers(get(theirs["response_ids"]), int, "response_ids are not integers"),
            recorded_logprobs=_numbers(
                get(self._recorded_column(source)),
                (int, float),
                "recorded log-probabilities do not match response_ids",
            ),
            sampling=_sampling(get(theirs["sampling"])),
            truncated=truncated,
            finish_reason=finish_reason if isinstance(finish_reason, str) else None,
            tools=prompt.tools,
            other={name: content for name, content in fields.items() if name not in self._taken},
        )
        characters = len(response) if isinstance(response, str) else sum(map(_characters, response))
        return Accepted(candidate, prompt.digest, content_digest, prompt.characters + characters)

    def _prompt(self, fields: dict[str, Any]) -> _Prompt:
        """A row's prompt; that of the row before, where both are the same text. Raises Unusable."""
        theirs, get = self._theirs, fields.get
        given = get(theirs["prompt"]), get(theirs["system_prompt"]), get(theirs["tools"])
        if given == self._last_given:
            return self._last_prompt
        text, system, tools = (without_nulls(value) for value in given) if self._has_structs else given
        messages = with_system_prompt(system, prompt_messages(text))
        offered = tools_of(tools)
        prompt = _Prompt(messages, offered, prompt_id_of(messages, offered), sum(map(_characters, messages)))
        if all(value is None or isinstance(value, str) for value in given):  # only texts that are equal are the same
            self._last_given, self._last_prompt = given, prompt
        return prompt

    def _recorded_column(self, source: str | None) -> str:
        behavior = self._behavior_of_all or (self._behavior_of_source.get(source) if source is not None else None)
        column = behavior.column if isinstance(behavior, RecordedBehavior) else RECORDED
        return self._theirs[RECORDED] if column == RECORDED else column


def _lift(row: dict[str, Any], path: str) -> None:
    """Give a row the field a.b of one of its objects as a column of that name; the object has it no more."""
    if path in row:
        return
    value = value_at(row, path)
    row[path] = None if value is MISSING else value
    if value is MISSING:
        return
    inner = row
    *above, last = path.split(".")
    for name in above:
        inner[name] = dict(inner[name])
        inner = inner[name]
    del inner[last]


def _characters(message: Message) -> int:
    calls = message.get("tool_calls")
    return len(message["content"]) + (len(str(calls)) if calls else 0)


def _text(value: Any, name: str) -> str | None:
    """An id or a source: text; whole numbers become text."""
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_IN_FLOAT:
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        raise Unusable(
            f"{name} has lost digits", "it is a float of more than 53 bits: keep it as an integer or as text"
        )
    raise Unusable(f"{name} has the wrong type", f"it is a {type(value).__name__}, not text or a whole number")


def _numbers(value: Any, kind: type | tuple[type, ...], reason: str) -> list[Any] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise Unusable(reason, f"there is a {type(value).__name__}, not a list")
    for number in value:
        if not isinstance(number, kind) or isinstance(number, bool):
            raise Unusable(reason, f"there is a {type(number).__name__} in the list")
    return value


def _sampling(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            raise Unusable("sampling is not an object", "the text is not JSON") from None
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Unusable("sampling is not an object", f"it is a {type(value).__name__}")
    kept = {key: value[key] for key in SAMPLING_KEYS if value.get(key) is not None}
    for key, setting in kept.items():
        if not isinstance(setting, int | float) or isinstance(setting, bool) or not abs(setting) < float("inf"):
            raise Unusable("sampling settings are not numbers", f"{key} is a {type(setting).__name__}")
        if key == "temperature" and setting < 0:
            raise Unusable("sampling settings are not numbers", "temperature is below 0")
    if value.get("logprobs") is not None:
        kept["logprobs"] = _numbers_said(value["logprobs"])
    return kept or None


def _numbers_said(value: Any) -> str:
    """What recorded log-probabilities are: raw or processed, also in vLLM's words for it."""
    word = str(value).removesuffix("_logprobs")
    if word not in ("raw", "processed"):
        raise Unusable("sampling.logprobs is not known", f"it is '{value}', not raw or processed")
    return word
