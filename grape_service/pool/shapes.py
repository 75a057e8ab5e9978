"""What a file's rows are: which columns hold the prompt, the responses and the source, as a sample of them shows."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from grape_service.config.pool import POOL_COLUMNS, PoolGroup
from grape_service.pool.answers import is_transcript, is_whole
from grape_service.pool.column_names import (
    ALIASES,
    BATCH_PROMPTS,
    CHOICES,
    CONVERSATIONS,
    ELEMENT_TEXTS,
    EVAL_PROMPTS,
    INPUTS,
    NUMBERED,
    OBJECT_LISTS,
    PAIR_SOURCES,
    PAIRS,
    PROMPTS,
    RESPONSE_LISTS,
    RESPONSES,
    SOURCES,
    SYSTEMS,
)
from grape_service.pool.filters import MISSING, value_at
from grape_service.pool.layout import DEALT_NAMES, PROMPT_KEY, RESPONSE_KEY, Layout
from grape_service.pool.messages import ends_with_response, is_conversation, parsed_json
from grape_service.pool.signatures import Signatures
from grape_service.rows.candidate import Row

MOST = 0.9
"""Share of the lists that have to have an element for each response, to be taken for lists of the responses."""


DEFAULTS = {"reasoning": "reasoning_content"}
"""The names of columns that are ours and are called otherwise."""


def find_layout(rows: Sequence[Row], group: PoolGroup, extra: Iterable[str] = ()) -> Layout:
    """The layout of a file of which `rows` are a sample; `extra` are columns that do not stand in them.

    What the config says comes first, then our own names, then those that published pools use. Where rows are read in
    several ways the most count: a row of another kind does not decide how the others are read.
    """
    return find_fitting(rows, group, extra)[0]


def find_fitting(rows: Sequence[Row], group: PoolGroup, extra: Iterable[str] = ()) -> tuple[Layout, list[Row]]:
    """The layout of a sample, and its rows without those that are read otherwise; those that say nothing come last."""
    extra, signed = tuple(extra), Signatures(group)
    by_signature: dict[Any, Layout] = {}
    alone: list[Layout] = []
    for row in rows:
        signature = signed.of(row)
        if signature not in by_signature:
            by_signature[signature] = layout_of([row], group, extra)
        alone.append(by_signature[signature])
    candidates = {(one.reading, one.columns): one for one in by_signature.values() if one.reading is not None}
    numbers = Counter(id(one) for one in alone)
    best = max(
        [layout_of(rows, group, extra), *candidates.values()],
        key=lambda layout: sum(numbers[id(one)] for one in by_signature.values() if layout.reads(one)),
    )
    fitting = [row for row, one in zip(rows, alone, strict=True) if best.reads(one)]
    fitting += [row for row, one in zip(rows, alone, strict=True) if one.reading is None]
    return layout_of(fitting, group, extra), fitting


def layout_of(rows: Sequence[Row], group: PoolGroup, extra: Iterable[str] = ()) -> Layout:
    """The layout of rows that are read alike."""
    return _Finder(rows, group, extra).layout()


class _Finder:
    def __init__(self, rows: Sequence[Row], group: PoolGroup, extra: Iterable[str]):
        self.rows = rows
        self.shape = "auto" if group.shape == "prompts" else group.shape
        self.has_source = group.source is not None
        carried = frozenset(group.carry)
        self.all_names = {name: None for row in rows for name in row} | dict.fromkeys(extra)
        self.names = {name: None for name in self.all_names if name not in carried}
        self.carried = carried
        self.filtered = {condition.column for condition in group.where}
        self.said = {ours: theirs for ours, theirs in group.columns.items() if isinstance(theirs, str)}
        several = group.columns.get("responses")
        self.said_columns = tuple(several) if isinstance(several, list) else ()
        self.values: dict[str, list[Any]] = {}

    def layout(self) -> Layout:
        theirs = {ours: self.said.get(ours, DEFAULTS.get(ours, ours)) for ours in POOL_COLUMNS}
        found = self._responses()
        shape, response = found.pop("shape"), found.pop("response", None)
        prompt = self._prompt(shape, found.get("conversation"), response, found.get("columns", ()))
        missing = "prompt" if prompt is None else "response" if response is None and shape != "columns" else None
        if shape == "messages":
            theirs |= {"prompt": PROMPT_KEY, "response": RESPONSE_KEY, "responses": RESPONSE_KEY + "s"}
        else:
            theirs["prompt"] = prompt or theirs["prompt"]
        if shape == "response":
            theirs["response"] = response or theirs["response"]
        elif shape == "responses":
            theirs["responses"] = response or theirs["responses"]
            holds_list = self._is(theirs["response"], dict | list) and not self._is_answer(theirs["response"])
            if holds_list or ("responses" in self.said and "response" not in self.said):
                theirs["response"] = RESPONSE_KEY
        elif shape == "columns":
            theirs |= {"responses": RESPONSE_KEY + "s", "response": RESPONSE_KEY}
        text_input = None
        if prompt == "instruction" and "prompt" not in self.said:
            text_input = next((name for name in INPUTS if response != name and self._texts(name)), None)
        for ours, names in ALIASES.items():
            if ours not in self.said and not self._has(ours):
                name = next((name for name in names if self._has(name)), None)
                theirs[ours] = name or next((name for name in names if name in self.names), ours)
        if "system_prompt" not in self.said:
            systems = [
                name for name in SYSTEMS if any(not isinstance(one, str) or one.strip() for one in self._all(name))
            ]
            texts = [name for name in systems if self._texts(name)]
            theirs["system_prompt"] = next(iter([*texts, *systems]), theirs["system_prompt"])
        for ours, name in theirs.items():
            if name in self.carried and ours not in self.said:
                theirs[ours] = f"\0{ours}"
        if "source" not in self.said and "source" not in self.carried:
            theirs["source"] = self._source(theirs["responses"])
        dealt = self._dealt(theirs, found.get("columns", ())) if shape == "responses" else ()
        guessed = {
            ours: name
            for ours, name in theirs.items()
            if name != DEFAULTS.get(ours, ours) and ours not in self.said and not name.startswith("\0")
        }
        lists = [name for name in (found.get("conversation"), theirs["responses"], *dealt) if name is not None]
        return Layout(
            shape=shape,
            theirs=theirs,
            columns=found.get("columns", ()),
            column_sources=self._pair_sources(found.get("columns", ())),
            conversation=found.get("conversation"),
            input=text_input,
            dealt=dealt,
            json_text=tuple(name for name in lists if self._is_json_text(name)),
            is_sharegpt=self._is_sharegpt(found.get("conversation")),
            missing=missing,
            guessed=guessed,
            names=tuple(sorted({*self.all_names, *itertools.chain(*self._elements(theirs["responses"]))})),
        )

    # where the responses are

    def _responses(self) -> Row:
        """The shape, with `response` (a column), `columns` or `conversation`."""
        if self.said_columns:
            return {"shape": "columns", "columns": self.said_columns}
        if "responses" in self.said:
            return {"shape": "responses", "response": self.said["responses"]}
        ends = "prompt" in self.said and self._ends_with_response(self.said["prompt"])
        if "response" in self.said:
            return {"shape": "response", "response": self.said["response"]}
        if ends and self.shape in ("auto", "messages"):
            name = self.said["prompt"]
            return {"shape": "messages", "conversation": name, "response": name}
        wanted = {
            "auto": (self._own, self._lists, self._numbered, self._pair, self._messages, self._single),
            "response": (self._single,),
            "responses": (self._lists,),
            "columns": (self._numbered, self._pair),
            "messages": (self._messages,),
        }[self.shape]
        for look in wanted:
            found = look()
            if found is not None:
                return found
        return {"shape": "response" if self.shape in ("auto", "columns", "messages") else self.shape}

    def _own(self) -> Row | None:
        """Our own names, where a prompt is there too."""
        if not self._has(self.said.get("prompt", "prompt")) and (self._messages() or not any(map(self._has, PROMPTS))):
            return None
        if self._is("responses", list) or self._is_json_text("responses"):
            return {"shape": "responses", "response": "responses"}
        if (
            self._is("response", str)
            or self._is_answer("response")
            or (self._is("response", list) and not self._lists())
        ):
            return {"shape": "response", "response": "response"}
        if self._has("responses") and not self._has("response"):
            return {"shape": "responses", "response": "responses"}
        return None

    def _lists(self) -> Row | None:
        for name in (*RESPONSE_LISTS, *OBJECT_LISTS, *CHOICES):
            first = self._first(name)
            first = parsed_json(first) if isinstance(first, str) else first
            if not isinstance(first, list) or (is_conversation(first) and not self._are_candidates(name, first)):
                continue
            element = next((one for one in first if one is not None), None)
            is_choice = isinstance(element, dict) and ("message" in element or "text" in element)
            is_object = isinstance(element, dict) and any(text in element for text in (*ELEMENT_TEXTS, "role"))
            if is_choice or (name in OBJECT_LISTS and is_object):
                return {"shape": "responses", "response": name}
            if name in RESPONSE_LISTS and isinstance(element, str | dict | list):
                return {"shape": "responses", "response": name}
        return None

    def _are_candidates(self, name: str, messages: list[Row]) -> bool:
        """Whether a list of messages is one of candidates: each the assistant's, beside a prompt of its own."""
        others = any(self._has(other) for other in (*PROMPTS, *CONVERSATIONS) if other != name)
        return name in RESPONSE_LISTS and others and all(ends_with_response([one]) for one in messages)

    def _numbered(self) -> Row | None:
        stems: dict[str, list[str]] = {}
        for name in self.names:
            match = NUMBERED.fullmatch(name)
            if match and (not self._has(name) or self._is(name, str | list)):
                stems.setdefault(match["stem"], []).append(name)
        several = [names for names in stems.values() if len(names) > 1 and any(map(self._has, names))]
        columns = [name for names in several for name in names]
        return {"shape": "columns", "columns": tuple(sorted(columns, key=_natural))} if columns else None

    def _messages(self) -> Row | None:
        for name in CONVERSATIONS:
            if self._ends_with_response(name):
                return {"shape": "messages", "conversation": name, "response": name}
        return None

    def _single(self) -> Row | None:
        taken = self.said.get("prompt")
        for name in RESPONSES:
            if name != taken and (self._is(name, str | list) or self._is_answer(name)):
                return {"shape": "response", "response": name}
        return None

    def _is_answer(self, name: str) -> bool:
        """Whether a column holds what a server answered, as an object, or one message of the assistant."""
        values = [value for value in self._all(name) if isinstance(value, dict)]
        answers = [
            one
            for one in values
            if ends_with_response([one])
            or any(isinstance(one.get(part), list) for part in ("content", "output", "parts"))
        ]
        return 2 * len(answers) > len(self._all(name))

    def _pair(self) -> Row | None:
        """Two columns with a response each, or with a conversation each that ends with one."""
        if self._has("response") and self.shape == "auto":
            return None
        for pair in PAIRS:
            if all(self._has(name) and (self._is(name, str | list) or self._is_answer(name)) for name in pair):
                return {"shape": "columns", "columns": pair}
        return None

    def _pair_sources(self, columns: tuple[str, ...]) -> tuple[str, ...]:
        names = PAIR_SOURCES.get(columns[0][-1]) if columns in PAIRS else None
        if columns == PAIRS[0]:
            names = PAIR_SOURCES["d"]
        said = "source" in self.said or self.has_source
        return names if names is not None and not said and all(self._is(name, str) for name in names) else ()

    # the rest

    def _prompt(
        self, shape: str, conversation: str | None, response: str | None, columns: tuple[str, ...]
    ) -> str | None:
        if "prompt" in self.said or conversation is not None:
            return self.said.get("prompt", conversation)
        for name in PROMPTS:
            if name != response and self._is(name, str | list):
                return name
        for name in (*CONVERSATIONS, *BATCH_PROMPTS):
            if name != response and is_conversation(self._first(name)):
                return name
        if response == "resps":
            return next((name for name in EVAL_PROMPTS if self._is(name, str) and self._has(name)), None)
        whole = columns or ((response,) if response is not None else ())
        firsts = [self._first(name) for name in whole if self._has(name)]
        if firsts and (all(map(is_whole, firsts)) or all(map(is_transcript, firsts))):
            return PROMPT_KEY
        return None

    def _source(self, responses: str) -> str:
        names: tuple[str, ...] = SOURCES[:1] if self.has_source or self._in_most("source") else SOURCES
        elements = self._elements(responses)
        for name in SOURCES:
            number = sum(element.get(name) is not None for element in elements)
            if name not in self.carried and number and 2 * number >= len(elements):
                return name
        texts = [name for name in names if self._is(name, str)]
        found = next((name for name in texts if self._in_most(name)), texts[0] if texts else None)
        if found is None and responses.endswith(".choices"):
            found = f"{responses.removesuffix('choices')}model"
        return found or "source"

    def _elements(self, responses: str) -> list[Row]:
        lists = [parsed_json(value) if isinstance(value, str) else value for value in self._all(responses)]
        return [one for value in lists if isinstance(value, list) for one in value if isinstance(one, dict)]

    def _dealt(self, theirs: dict[str, str], columns: tuple[str, ...]) -> tuple[str, ...]:
        """Columns of lists that have as many elements as the row has responses, in most rows of the sample."""
        roots = {name.split(".")[0] for ours, name in theirs.items() if ours not in DEALT_NAMES}
        ours = {theirs[name] for name in DEALT_NAMES}
        dealt = []
        for name in self.names:
            if name in roots or name in columns:
                continue
            values = [(value, self._number(row, theirs["responses"])) for row in self.rows if (value := row.get(name))]
            fitting = sum(_is_for_each(value, number) for value, number in values)
            needed = 0 if name in self.filtered or name in ours else min(MOST * len(values), len(values) - 1)
            if 2 * fitting >= len(values) and fitting >= max(1, needed):
                dealt.append(name)
        return tuple(dealt)

    def _number(self, row: Row, responses: str) -> int:
        value = value_at(row, responses)
        value = parsed_json(value) if isinstance(value, str) else value
        return len(flat(value)) if isinstance(value, list) else -1

    def _all(self, name: str) -> list[Any]:
        if name not in self.values:
            found = [] if name in self.carried else [value_at(row, name) for row in self.rows]
            self.values[name] = [value for value in found if value is not MISSING and value is not None]
        return self.values[name]

    def _first(self, name: str) -> Any:
        return next(iter(self._all(name)), None)

    def _has(self, name: str) -> bool:
        return bool(self._all(name))

    def _in_most(self, name: str) -> bool:
        """Whether most rows have a column, or the folders do."""
        number = sum(name in row for row in self.rows)
        return name in self.names and (2 * number > len(self.rows) or not number)

    def _is(self, name: str, types: Any) -> bool:
        """Whether most values of a column are of these types."""
        values = self._all(name)
        return 2 * sum(isinstance(value, types) for value in values) > len(values)

    def _texts(self, name: str) -> bool:
        return self._is(name, str) and any(isinstance(value, str) and value.strip() for value in self._all(name))

    def _is_json_text(self, name: str) -> bool:
        texts = [value for value in self._all(name) if isinstance(value, str)]
        return 2 * sum(isinstance(parsed_json(text), list) for text in texts) > len(texts)

    def _ends_with_response(self, name: str) -> bool:
        return any(ends_with_response(value) for value in self._all(name))

    def _is_sharegpt(self, name: str | None) -> bool:
        first = self._first(name) if name is not None else None
        first = parsed_json(first) if isinstance(first, str) else first
        return isinstance(first, list) and any(isinstance(one, dict) and "from" in one for one in first)


def flat(responses: list[Any]) -> list[Any]:
    """A list of responses; of lists of texts, one for each request as lm-eval has them, the texts."""
    if responses and all(isinstance(one, list) and one and isinstance(one[0], str) for one in responses):
        return [text for one in responses for text in one]
    return responses


def _is_for_each(value: Any, number: int) -> bool:
    value = parsed_json(value) if isinstance(value, str) else value
    return isinstance(value, list) and len(value) == number and not is_conversation(value)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]
