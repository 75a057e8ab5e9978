"""Pool rows to candidates: renamed columns, lists of responses, ids given or derived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from grape_service.config.policy import RecordedBehavior
from grape_service.config.schema import POOL_COLUMNS, Config
from grape_service.pool.column_types import Kind
from grape_service.pool.filters import passes
from grape_service.pool.messages import Unusable, prompt_messages, response_of, tools_of
from grape_service.rows.candidate import Candidate, Message, Rejection
from grape_service.rows.keys import candidate_id_of, prompt_id_of

RECORDED = "behavior_logprobs"
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


@dataclass
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


def recorded_columns(config: Config) -> set[str]:
    """The pool's columns with log-probabilities recorded at sampling time."""
    behavior = config.behavior
    columns = {RECORDED}
    if behavior is not None and behavior.column is not None:
        columns.add(behavior.column)
    for of_source in (behavior.sources or {}).values() if behavior is not None else ():
        if isinstance(of_source, RecordedBehavior):
            columns.add(of_source.column)
    return {config.pool.columns.get(column, column) for column in columns}


class Normaliser:
    """Makes candidates of a pool's rows, under the names that the config gives."""

    def __init__(self, config: Config):
        self.where = config.pool.where
        self.truncated = config.pool.truncated
        behavior = config.behavior
        self._behavior_of_source = (behavior.sources if behavior is not None else None) or {}
        self._behavior_of_all = None if behavior is None or behavior.sources else behavior.of_source(None)
        self._theirs = {column: config.pool.columns.get(column, column) for column in POOL_COLUMNS}
        self._taken = frozenset(self._theirs.values()) | recorded_columns(config)
        self._taken_in_list = self._taken | frozenset(POOL_COLUMNS)
        self.filter_columns_seen = {condition.column: 0 for condition in self.where}
        """How many candidates had each column that pool.where names."""

    def candidates(self, row: dict[str, Any]) -> Iterator[Accepted | Filtered | Rejected]:
        """The candidates of one row; a row that is unusable as a whole gives one Rejected."""
        responses = row.get(self._theirs["responses"])
        if responses is None:
            yield self._checked(row, {})
            return
        if row.get(self._theirs["response"]) is not None:
            yield self._rejected(row, Rejection("both response and responses"))
        elif not isinstance(responses, list):
            yield self._rejected(row, Rejection("responses are not a list"))
        elif not responses:
            yield self._rejected(row, Rejection("missing response", "responses is an empty list"))
        else:
            try:
                prompt_messages(row.get(self._theirs["prompt"]))
            except Unusable as error:
                yield self._rejected(row, error.rejection)
                return
            for response in responses:
                yield self._checked(row, self._element(response))

    def _element(self, response: Any) -> dict[str, Any]:
        """One of `responses` under the pool's names: text, an object with a response, or a list of messages."""
        if not isinstance(response, dict):
            return {self._theirs["response"]: response}
        return {
            self._theirs[name] if name in self._theirs and self._theirs[name] not in response else name: value
            for name, value in response.items()
        }

    def _checked(self, row: dict[str, Any], element: dict[str, Any]) -> Accepted | Filtered | Rejected:
        fields = {**row, **element} if element else row
        if self.where:
            for column in self.filter_columns_seen:
                self.filter_columns_seen[column] += column in fields
            if not passes(fields, self.where):
                return Filtered()
        try:
            return self._accepted(fields, self._taken_in_list if element else self._taken)
        except Unusable as error:
            return self._rejected(fields, error.rejection)

    def _rejected(self, fields: dict[str, Any], rejection: Rejection) -> Rejected:
        ids = [fields.get(self._theirs[name]) for name in ("prompt_id", "candidate_id")]
        prompt_id, candidate_id = (str(id_) if isinstance(id_, str | int) else None for id_ in ids)
        return Rejected(rejection, prompt_id, candidate_id)

    def _accepted(self, fields: dict[str, Any], taken: frozenset[str]) -> Accepted:
        def value(name: str) -> Any:
            return fields.get(self._theirs[name])

        prompt = prompt_messages(value("prompt"))
        response = response_of(value("response"))
        source = _text(value("source"), "source")
        tools = tools_of(value("tools"))
        truncated = value("finish_reason") == "length"
        if truncated and self.truncated == "reject":
            raise Unusable("truncated", "its finish_reason is 'length'")
        prompt_digest, content_digest = _digests(prompt, tools, source, response)
        candidate = Candidate(
            prompt=prompt,
            response=response,
            prompt_id=_text(value("prompt_id"), "prompt_id") or prompt_digest,
            candidate_id=_text(value("candidate_id"), "candidate_id") or content_digest,
            source=source,
            response_ids=_numbers(value("response_ids"), int, "response_ids are not integers"),
            recorded_logprobs=_numbers(
                fields.get(self._recorded_column(source)),
                (int, float),
                "recorded log-probabilities do not match response_ids",
            ),
            sampling=_sampling(value("sampling")),
            truncated=truncated,
            tools=tools,
            other={name: content for name, content in fields.items() if name not in taken},
        )
        characters = sum(map(_characters, prompt)) + (
            len(response) if isinstance(response, str) else sum(map(_characters, response))
        )
        return Accepted(candidate, prompt_digest, content_digest, characters)

    def _recorded_column(self, source: str | None) -> str:
        behavior = self._behavior_of_all or (self._behavior_of_source.get(source) if source is not None else None)
        column = behavior.column if isinstance(behavior, RecordedBehavior) else RECORDED
        return self._theirs[RECORDED] if column == RECORDED else column


def _characters(message: Message) -> int:
    calls = message.get("tool_calls")
    return len(message["content"]) + (len(str(calls)) if calls else 0)


def _digests(
    prompt: list[Message], tools: list[dict[str, Any]] | None, source: str | None, response: str | list[Message]
) -> tuple[str, str]:
    prompt_digest = prompt_id_of(prompt, tools)
    return prompt_digest, candidate_id_of(prompt_digest, source, response)


def _text(value: Any, name: str) -> str | None:
    """An id or a source: text; whole numbers become text."""
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
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
    return kept or None
