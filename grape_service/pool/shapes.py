"""What a file's rows are: which columns hold the prompt, the responses and the source, as its first rows show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from grape_service.config.schema import POOL_COLUMNS, PoolGroup
from grape_service.pool.filters import MISSING, value_at
from grape_service.pool.messages import ends_with_response, is_conversation, parsed_json

Row = dict[str, Any]

PROMPTS = ("prompt", "instruction", "question", "problem", "query", "input", "user_prompt", "prompt_text")
BATCH_PROMPTS = ("messages", "input.messages", "request.messages", "body.messages", "request.body.messages")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "dialogue", "trajectory", "chat")
RESPONSE_LISTS = ("responses", "generations", "completions", "outputs", "candidates", "samples", "generated_responses")
CHOICES = ("choices", "response.choices", "response.body.choices", "body.choices", "completion.choices")
RESPONSES = (
    *("response", "output", "completion", "generation", "generated_text", "generated_solution", "model_output"),
    *("model_response", "answer", "solution", "chosen"),
)
PAIR = ("chosen", "rejected")
SOURCES = ("source", "generator", "model", "model_name", "generation_model", "teacher_model")
ELEMENT_TEXTS = ("response", "output", "text", "completion", "generation", "generated_text", "answer", "content")
SYSTEMS = ("system_prompt", "system")
NUMBERED = re.compile(
    r"(?P<stem>.*(?:response|solution|output|generation|completion|answer|candidate|sample)s?_?)[0-9]+", re.I
)
DEALT_NAMES = ("source", "candidate_id", "response_ids", "behavior_logprobs", "sampling", "finish_reason")
"""Our columns that belong to one candidate: beside a list of responses, a list of them is dealt."""

PROMPT_KEY, RESPONSE_KEY = "\0prompt", "\0response"
"""Under which a row has what was made of other columns of it."""
RESPONSE_COLUMN = "response_column"
"""The column that says which of several columns a response is from."""


@dataclass(frozen=True)
class Layout:
    """How rows of a file are read."""

    shape: str
    """One of config.schema.Shape but auto."""
    theirs: dict[str, str]
    """Our column names to theirs, each of them."""
    columns: tuple[str, ...] = ()
    """Several columns with a response each."""
    conversation: str | None = None
    """The column with messages that end with the response."""
    input: str | None = None
    """A column that continues the prompt, as in Alpaca's instruction, input and output."""
    dealt: tuple[str, ...] = ()
    """Lists with an element for each response."""
    json_text: tuple[str, ...] = ()
    """Columns with lists as JSON text."""
    is_sharegpt: bool = False
    missing: str | None = None
    """Our name of what no column of the first rows holds: prompt or response."""
    guessed: dict[str, str] = field(default_factory=dict)
    """Of `theirs`, what the config does not say and has another name."""

    def describe(self) -> str:
        """The shape in words, with the names of columns."""
        if self.missing is not None:
            return f"no {self.missing} found"
        if self.conversation is not None:
            what = f"messages that end with the response, in '{self.conversation}'"
            what += " (ShareGPT: from, value)" if self.is_sharegpt else ""
        else:
            prompt = f"'{self.theirs['prompt']}'" + (f" and '{self.input}'" if self.input else "")
            if self.columns:
                what = f"prompt in {prompt}, a response in each of {', '.join(self.columns)}"
            elif self.shape == "responses":
                what = f"prompt in {prompt}, a list of responses in '{self.theirs['responses']}'"
            else:
                what = f"prompt in {prompt}, response in '{self.theirs['response']}'"
        others = [
            f"{ours} in '{name}'"
            for ours, name in self.guessed.items()
            if ours not in ("prompt", "response", "responses")
        ]
        others += [f"dealt to the responses: {', '.join(self.dealt)}"] if self.dealt else []
        return "; ".join([what, *others])


def find_layout(rows: Sequence[Row], group: PoolGroup, extra: Iterable[str] = ()) -> Layout:
    """The layout of a file that begins with `rows`; `extra` are columns that do not stand in them.

    What the config says comes first, then our own names, then those that published pools use.
    """
    return _Finder(rows, group, extra).layout()


class _Finder:
    def __init__(self, rows: Sequence[Row], group: PoolGroup, extra: Iterable[str]):
        self.rows = rows
        self.shape = group.shape
        self.has_source = group.source is not None
        self.names = {name: None for row in rows for name in row} | dict.fromkeys(extra)
        self.said = {ours: theirs for ours, theirs in group.columns.items() if isinstance(theirs, str)}
        several = group.columns.get("responses")
        self.said_columns = tuple(several) if isinstance(several, list) else ()
        self.values: dict[str, list[Any]] = {}

    def layout(self) -> Layout:
        theirs = {ours: self.said.get(ours, ours) for ours in POOL_COLUMNS}
        found = self._responses()
        shape, response = found.pop("shape"), found.pop("response", None)
        prompt = self._prompt(shape, found.get("conversation"), response)
        missing = "prompt" if prompt is None else "response" if response is None and shape != "columns" else None
        if shape == "messages":
            theirs |= {"prompt": PROMPT_KEY, "response": RESPONSE_KEY, "responses": RESPONSE_KEY + "s"}
        else:
            theirs["prompt"] = prompt or theirs["prompt"]
        if shape == "response":
            theirs["response"] = response or theirs["response"]
        elif shape == "responses":
            theirs["responses"] = response or theirs["responses"]
            holds_list = isinstance(self._first(theirs["response"]), dict | list)
            if holds_list or ("responses" in self.said and "response" not in self.said):
                theirs["response"] = RESPONSE_KEY
        elif shape == "columns":
            theirs |= {"responses": RESPONSE_KEY + "s", "response": RESPONSE_KEY}
        text_input = None
        if prompt == "instruction" and "prompt" not in self.said and self._texts("input") and response != "input":
            text_input = "input"
        dealt = self._dealt(theirs, found.get("columns", ())) if shape == "responses" else ()
        if "finish_reason" not in self.said and "finish_reason" not in self.names:
            plural = next((name for name in ("finish_reasons", "stop_reason") if name in self.names), None)
            theirs["finish_reason"] = plural or theirs["finish_reason"]
        if "system_prompt" not in self.said:
            theirs["system_prompt"] = next((name for name in SYSTEMS if self._texts(name)), theirs["system_prompt"])
        if "source" not in self.said:
            theirs["source"] = self._source(theirs["responses"])
        guessed = {
            ours: name
            for ours, name in theirs.items()
            if name != ours and ours not in self.said and not name.startswith("\0")
        }
        lists = [name for name in (found.get("conversation"), theirs["responses"], *dealt) if name is not None]
        return Layout(
            shape=shape,
            theirs=theirs,
            columns=found.get("columns", ()),
            conversation=found.get("conversation"),
            input=text_input,
            dealt=dealt,
            json_text=tuple(name for name in lists if self._is_json_text(name)),
            is_sharegpt=self._is_sharegpt(found.get("conversation")),
            missing=missing,
            guessed=guessed,
        )

    # where the responses are

    def _responses(self) -> dict[str, Any]:
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
            "auto": (self._own, self._lists, self._numbered, self._messages, self._single, self._pair),
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

    def _own(self) -> dict[str, Any] | None:
        """Our own names, where a prompt is there too."""
        if not self._has(self.said.get("prompt", "prompt")) and (self._messages() or not any(map(self._has, PROMPTS))):
            return None
        if isinstance(self._first("responses"), list) or self._is_json_text("responses"):
            return {"shape": "responses", "response": "responses"}
        response = self._first("response")
        if isinstance(response, str) or (isinstance(response, list) and not self._lists()):
            return {"shape": "response", "response": "response"}
        if self._has("responses") and response is None:
            return {"shape": "responses", "response": "responses"}
        return None

    def _lists(self) -> dict[str, Any] | None:
        for name in (*RESPONSE_LISTS, *CHOICES):
            first = self._first(name)
            first = parsed_json(first) if isinstance(first, str) else first
            if not isinstance(first, list) or is_conversation(first):
                continue
            element = next((one for one in first if one is not None), None)
            is_choice = isinstance(element, dict) and ("message" in element or "text" in element)
            if is_choice or (name in RESPONSE_LISTS and isinstance(element, str | dict | list)):
                return {"shape": "responses", "response": name}
        return None

    def _numbered(self) -> dict[str, Any] | None:
        stems: dict[str, list[str]] = {}
        for name in self.names:
            match = NUMBERED.fullmatch(name)
            if match and isinstance(self._first(name), str | list | None):
                stems.setdefault(match["stem"], []).append(name)
        several = [names for names in stems.values() if len(names) > 1 and any(map(self._has, names))]
        columns = [name for names in several for name in names]
        return {"shape": "columns", "columns": tuple(sorted(columns, key=_natural))} if columns else None

    def _messages(self) -> dict[str, Any] | None:
        for name in CONVERSATIONS:
            if self._ends_with_response(name):
                return {"shape": "messages", "conversation": name, "response": name}
        return None

    def _single(self) -> dict[str, Any] | None:
        taken = self.said.get("prompt")
        if all(self._first(name) is not None for name in PAIR) and not self._has("response"):
            return self._pair()
        for name in RESPONSES:
            if name != taken and isinstance(self._first(name), str | list):
                return {"shape": "response", "response": name}
        return None

    def _pair(self) -> dict[str, Any] | None:
        if all(isinstance(self._first(name), str | list) for name in PAIR):
            return {"shape": "columns", "columns": PAIR}
        return None

    # the rest

    def _prompt(self, shape: str, conversation: str | None, response: str | None) -> str | None:
        if "prompt" in self.said or conversation is not None:
            return self.said.get("prompt", conversation)
        for name in PROMPTS:
            if name != response and isinstance(self._first(name), str | list):
                return name
        for name in (*CONVERSATIONS, *BATCH_PROMPTS):
            if name != response and is_conversation(self._first(name)):
                return name
        return None

    def _source(self, responses: str) -> str:
        names: tuple[str, ...] = SOURCES[:1] if self.has_source or "source" in self.names else SOURCES
        elements = self._elements(responses)
        in_elements = next((name for name in SOURCES if any(name in element for element in elements)), None)
        if in_elements is not None:
            return in_elements
        found = next((name for name in names if isinstance(self._first(name), str)), None)
        if found is None and responses.endswith(".choices"):
            found = f"{responses.removesuffix('choices')}model"
        return found or "source"

    def _elements(self, responses: str) -> list[Row]:
        lists = [parsed_json(value) if isinstance(value, str) else value for value in self._all(responses)]
        return [one for value in lists if isinstance(value, list) for one in value if isinstance(one, dict)]

    def _dealt(self, theirs: dict[str, str], columns: tuple[str, ...]) -> tuple[str, ...]:
        """Columns whose values are all lists with as many elements as the row has responses."""
        roots = {name.split(".")[0] for ours, name in theirs.items() if ours not in DEALT_NAMES}
        dealt = []
        for name in self.names:
            if name in roots or name in columns:
                continue
            values = [(value, self._number(row, theirs["responses"])) for row in self.rows if (value := row.get(name))]
            if values and all(_is_for_each(value, number) for value, number in values):
                dealt.append(name)
        return tuple(dealt)

    def _number(self, row: Row, responses: str) -> int:
        value = value_at(row, responses)
        value = parsed_json(value) if isinstance(value, str) else value
        return len(value) if isinstance(value, list) else -1

    def _all(self, name: str) -> list[Any]:
        if name not in self.values:
            found = [value_at(row, name) for row in self.rows]
            self.values[name] = [value for value in found if value is not MISSING and value is not None]
        return self.values[name]

    def _first(self, name: str) -> Any:
        return next(iter(self._all(name)), None)

    def _has(self, name: str) -> bool:
        return bool(self._all(name))

    def _texts(self, name: str) -> bool:
        values = self._all(name)
        return bool(values) and all(isinstance(value, str) for value in values) and any(map(str.strip, values))

    def _is_json_text(self, name: str) -> bool:
        values = self._all(name)
        return bool(values) and all(isinstance(v, str) and isinstance(parsed_json(v), list) for v in values)

    def _ends_with_response(self, name: str) -> bool:
        return any(ends_with_response(value) for value in self._all(name))

    def _is_sharegpt(self, name: str | None) -> bool:
        first = self._first(name) if name is not None else None
        first = parsed_json(first) if isinstance(first, str) else first
        return isinstance(first, list) and any(isinstance(one, dict) and "from" in one for one in first)


def _is_for_each(value: Any, number: int) -> bool:
    value = parsed_json(value) if isinstance(value, str) else value
    return isinstance(value, list) and len(value) == number and not is_conversation(value)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]
