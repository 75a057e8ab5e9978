"""Names of columns that this field gives a meaning, and what becomes of each: docs/pools.md has the same table."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from grape_service.pool.column_names import FINISHES, KWARGS, MASKS, PREFILLS, SAMPLINGS, SOURCES, SYSTEMS
from grape_service.pool.filters import value_of_text
from grape_service.pool.lines import beginning
from grape_service.pool.messages import Unusable
from grape_service.pool.values import SAMPLING_KEYS, said
from grape_service.rows.candidate import Message, Row


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FLAGS = frozenset(
    _names(
        """
    on off true false none null nan auto enabled disabled yes no default
    minimal low medium high xhigh max concise detailed
    """
    )
)
"""Texts of a column named `reasoning` that switch thoughts on and off and hold none."""
NUMBERS_AS_TEXT = re.compile(r"\s*\[[\[\s]*[-+]?(?:[0-9.]|nan|inf)")
"""How a list of numbers begins that is written otherwise than JSON, as NumPy prints it."""


def _is_there(value: Any) -> bool:
    value = said(value)
    return value is not None and value != "" and value != [] and value != {}


def _is_text(value: Any) -> bool:
    value = said(value)
    if isinstance(value, list | dict):
        return any(map(_is_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and bool(value.strip()) and value.strip().lower() not in FLAGS


def _is_list_or_object(value: Any) -> bool:
    value = said(value)
    return bool(value) if isinstance(value, list | dict) else _is_printed(value)


def _is_weight(value: Any) -> bool:
    value = said(value)
    if isinstance(value, str):
        number = value_of_text(value)
        return _is_printed(value) if number is None else number != 1
    return bool(value) if isinstance(value, list | dict) else isinstance(value, int | float) and value != 1


def _are_integers(value: Any) -> bool:
    value = said(value)
    if not isinstance(value, list):
        return _is_printed(value)
    first = next((one for one in value if one is not None), None)
    if isinstance(first, list):
        return any(map(_are_integers, value))
    return type(first) is int or (isinstance(first, float) and first.is_integer())


def _is_printed(value: Any) -> bool:
    """Whether a text is a list of numbers that is not JSON."""
    return isinstance(value, str) and NUMBERS_AS_TEXT.match(value) is not None


Becomes = Literal["read", "column", "reject", "refused"]


@dataclass(frozen=True)
class Meaning:
    """What some columns hold, and what becomes of them."""

    names: tuple[str, ...]
    holds: str
    """What a column of these names holds."""
    becomes: Becomes
    """read: it has a place in a candidate; column: carried along, for filters; reject: rows with it cannot be used;
    refused: the run stops until the config reads it or carries it."""
    how: str
    """In a sentence: how it is read, or how the config says so."""
    is_meant: Callable[[Any], bool] = _is_there
    """Whether a value has that meaning."""
    is_of_prompt: bool = False
    """Whether it belongs to the prompt, which gather reads alone."""

    def way(self, name: str) -> str:
        """How the config reads a column of that name."""
        return self.how.replace("NAME", name).replace("`", "")


MEDIA = Meaning(
    _names(
        """
        images image videos video audio audios image_url image_urls image_path image_paths
        multi_modal_data multi_modal_inputs mm_data pixel_values
        """
    ),
    "images, videos or sound that the prompt shows",
    "reject",
    "a row that has one, or a placeholder such as `<image>` beside such a column, is a reject: the target reads text",
    is_of_prompt=True,
)
REFUSED = (
    Meaning(
        _names(
            """
        logprobs logprob log_probs logps token_logprobs response_logprobs completion_logprobs
        output_logprobs output_token_logprobs rollout_logprobs rollout_log_probs sampling_logprobs
        old_logprobs old_log_probs old_per_token_logps per_token_logps sampling_per_token_logps
        ref_logprobs ref_log_probs ref_log_prob teacher_logprobs prompt_logprobs
        """
        ),
        "log-probabilities of tokens",
        "refused",
        "read them with `behavior: {column: NAME}`",
        _is_list_or_object,
    ),
    Meaning(
        _names("reasoning thinking thoughts thought cot chain_of_thought reasoning_text rationale"),
        "what the writer thought before the response",
        "refused",
        "read it with `pool.columns: {reasoning: NAME}`",
        _is_text,
    ),
    Meaning(
        _names(
            """
        completion_ids response_token_ids completion_token_ids output_ids output_token_ids token_ids
        generated_ids
        """
        ),
        "token ids of the response",
        "refused",
        "read them with `pool.columns: {response_ids: NAME}`",
        _are_integers,
    ),
    Meaning(
        _names("input_ids prompt_ids prompt_token_ids input_token_ids tokens labels attention_mask"),
        "a prompt or a whole row that was tokenised already",
        "refused",
        "give prompt and response as text or messages, which the target's own template renders",
        _are_integers,
    ),
    Meaning(
        _names(
            """
        weight weights sample_weight loss_weight loss_weights token_weights token_weight advantage
        advantages returns
        """
        ),
        "how much a row or a token counts in training",
        "refused",
        "leave out rows with `pool.where`, as weights are made by `weights`",
        _is_weight,
    ),
    Meaning(
        ("history", "chat_history", "dialogue_history"),
        "earlier turns of the conversation",
        "refused",
        "put them into the prompt as messages",
        is_of_prompt=True,
    ),
    Meaning(
        ("functions", "tool_definitions", "available_tools", "tools_json"),
        "tools that the prompt offers",
        "refused",
        "read them with `pool.columns: {tools: NAME}`",
        is_of_prompt=True,
    ),
    Meaning(
        ("context",),
        "what a prompt that is no `instruction` is about",
        "refused",
        "put it into the prompt",
        _is_text,
        is_of_prompt=True,
    ),
    Meaning(
        ("documents",),
        "documents that the template puts into the prompt",
        "refused",
        "put them into the prompt",
        _is_list_or_object,
        is_of_prompt=True,
    ),
)
MEANINGS = (
    Meaning(
        FINISHES, "why the response ended", "read", "as `finish_reason`; also inside of responses that are objects"
    ),
    Meaning(
        MASKS,
        "which of `response_ids` the policy wrote",
        "read",
        "as `response_mask`: tokens where it is 0 have no loss and no ratio; it needs `response_ids`",
    ),
    Meaning(KWARGS, "variables of the chat template", "read", "over `render.template_kwargs`, for that row alone"),
    Meaning(
        (*SAMPLINGS, *SAMPLING_KEYS),
        "how the response was sampled",
        "read",
        "as `sampling`, and carried along",
    ),
    Meaning(
        PREFILLS,
        "words of the assistant that the policy was given, and that the response continues",
        "read",
        "as `prefill`: in front of the response, without loss and ratio; prompts that differ in it compete apart",
    ),
    Meaning(("reasoning_content",), "the thoughts of the response", "read", "as `reasoning_content` of its message"),
    Meaning(SYSTEMS, "the system prompt", "read", "as `system_prompt`"),
    Meaning(
        ("input",), "what an `instruction` is about", "read", "after the instruction and an empty line, as `context` is"
    ),
    Meaning(SOURCES, "who wrote the response", "read", "the first of them as `source`"),
    Meaning(("tools",), "tools that the prompt offers", "read", "by the template"),
    Meaning(
        ("meta_info",),
        "SGLang's answer about a response",
        "read",
        "its `finish_reason` and `output_token_logprobs`, with `output_ids` beside it",
    ),
    Meaning(
        _names("reward rewards score scores correct rating"),
        "how good a response is",
        "column",
        "each response's own where it is a list of them or a field of theirs; `pool.where` filters by it",
    ),
    MEDIA,
    *REFUSED,
)
BY_NAME = {name: meaning for meaning in (MEDIA, *REFUSED) for name in meaning.names}
"""Columns that are not read by themselves."""


def refusal(name: str, rows: int, group: str) -> str:
    """Why a run is refused that has a column which means something and is not read, with the two ways out."""
    meaning = BY_NAME[name]
    return (
        f"the column '{name}' of {group} holds {meaning.holds} ({rows:,} rows), and nothing reads it: "
        f"{meaning.way(name)}, or carry it along as it is with pool.carry: [{name}]"
    )


def table() -> list[str]:
    """The table of docs/pools.md, a line each."""
    words = {"read": "read", "column": "a column", "reject": "rejects", "refused": "refused until the config says more"}
    lines = ["| columns | hold | become | how |", "|---|---|---|---|"]
    for meaning in MEANINGS:
        names = ", ".join(f"`{name}`" for name in meaning.names)
        lines.append(f"| {names} | {meaning.holds} | {words[meaning.becomes]} | {meaning.how} |")
    return lines


NEEDS_MEDIA = "needs images, video or sound"
PLACEHOLDER = re.compile(r"<\|?(?:image|video|audio)(?:_[0-9]+|_pad)?\|?>", re.I)


class Unread:
    """What of the rows of a file is not read."""

    def __init__(self, prompts_alone: bool = False):
        """`prompts_alone`: what rows say of responses does not matter."""
        self.counts: dict[str, int] = {}
        """Rows and responses that have a column which means something and is not read, by the column."""
        self.names: set[str] = set()
        """Every column and field that was seen."""
        self._prompts_alone = prompts_alone
        self.meant: dict[str, Meaning] = {}
        """What is not read, by the column."""
        self.media: list[str] = []
        """Columns of what needs more than text."""

    def notice(self, names: Iterable[str], read: Collection[str]) -> None:
        """See which columns mean something; `read` are those that the config reads or carries."""
        for name in names:
            self.names.add(name)
            meaning = BY_NAME.get(name)
            if meaning is None or name in read or (self._prompts_alone and not meaning.is_of_prompt):
                continue
            if meaning is MEDIA:
                self.media.append(name)
            else:
                self.meant[name] = meaning

    def look(self, fields: Row) -> None:
        """Count those that a row or a response has a value in."""
        for name, meaning in self.meant.items():
            if name == "output_ids" and "meta_info" in fields:
                continue
            if name in fields and meaning.is_meant(fields[name]):
                self.counts[name] = self.counts.get(name, 0) + 1

    def refuse_media(self, fields: Row) -> None:
        """Raises Unusable for a candidate that needs more than text."""
        for name in self.media:
            if MEDIA.is_meant(fields.get(name)):
                raise Unusable(NEEDS_MEDIA, f"'{name}' is {beginning(str(fields[name]))[:60]}")

    def refuse_placeholders(self, prompt: list[Message]) -> None:
        """Raises Unusable for a prompt that shows an image, in rows with a column of images."""
        for message in prompt:
            if shown := PLACEHOLDER.search(message["content"]):
                raise Unusable(NEEDS_MEDIA, f"its prompt says {shown[0]}, beside the column '{self.media[0]}'")
