"""Checks on the text of kept rows: language, refusals, boilerplate, cut sentences, evaluation sets."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.checks.findings import Flagged
from grape_service.checks.tokens import without_turn_end
from grape_service.config.checks import Boilerplate, Language, Refusal, Truncation
from grape_service.rows.messages import shown_content

WORD = re.compile(r"\w+")
REFUSAL = re.compile(
    r"\b(i('m| am) (sorry|unable|not able)|i (can(no|')t|won't|will not) (help|assist|provide|do|answer|comply|fulfil)"
    r"|as an ai\b.{0,80}\b(can(no|')t|unable)|i must (decline|refuse))",
    re.I,
)
BOILERPLATE = re.compile(
    r"(as an ai( language)? model|i hope (this|that) helps|feel free to ask|let me know if you have any (other|more|"
    r"further)|is there anything else i can|certainly! here|great question!|knowledge cutoff)",
    re.I,
)
SENTENCE_END = re.compile(r"[.!?…:;)\]}>\"'”’»`*|$%。！？；）」』؟।\d]\s*$")

SCRIPTS = (
    ("ru", re.compile("[\u0400-\u04ff]")),
    ("el", re.compile("[\u0370-\u03ff]")),
    ("ja", re.compile("[\u3040-\u30ff]")),
    ("zh", re.compile("[\u4e00-\u9fff]")),
    ("ko", re.compile("[\uac00-\ud7af]")),
    ("ar", re.compile("[\u0600-\u06ff]")),
    ("he", re.compile("[\u0590-\u05ff]")),
    ("hi", re.compile("[\u0900-\u097f]")),
    ("th", re.compile("[\u0e00-\u0e7f]")),
)
FREQUENT = {
    "en": "the and of to is in that it for you with this are be on not have",
    "de": "der die und das ist nicht ein eine zu mit den auf für von sich auch",
    "fr": "le la les et des est une dans que pour pas qui vous sur avec ce",
    "es": "el los las que una para con por no del se como más pero es lo",
    "it": "il che di una per non con sono della gli le anche come più è nel",
    "pt": "o que não uma para com os do da em mais como dos por é você",
    "nl": "de het een van en dat niet zijn voor met op te ook maar wordt",
}
_FREQUENT = {language: frozenset(words.split()) for language, words in FREQUENT.items()}


def texts(table: pa.Table) -> Iterator[tuple[str, str]]:
    """(prompt, response) of each row as text: the turns before and after the prompt's end."""
    for messages, count in zip(table["messages"].to_pylist(), table["num_prompt_messages"].to_pylist(), strict=True):
        turns = [shown_content(turn.get("content")) for turn in orjson.loads(messages)]
        yield "\n".join(turns[:count]), "\n".join(turns[count:])


def language_of(text: str) -> str | None:
    """A guess at a text's language by its script, or by frequent words of seven languages; None where unsure."""
    sample = text[:4000]
    letters = sum(character.isalpha() for character in sample)
    for language, script in SCRIPTS:
        if letters >= 4 and len(script.findall(sample)) > 0.3 * letters:
            return language
    words = [word.lower() for word in WORD.findall(sample)]
    if len(words) < 12:
        return None
    shares = sorted(((sum(w in known for w in words) / len(words), name) for name, known in _FREQUENT.items()))
    (second, _), (best, language) = shares[-2:]
    return language if best > 0.12 and best > 1.4 * second else None


def language(table: pa.Table, check: Language) -> Flagged:
    """Responses in a language that is not wanted."""
    return _of_each(table, lambda _, text: _other_language(text, check.languages))


def _other_language(text: str, wanted: list[str]) -> tuple[str, str | None] | None:
    found = language_of(text)
    return (f"language {found}", None) if found is not None and found not in wanted else None


def refusal(table: pa.Table, check: Refusal) -> Flagged:
    """Responses that begin with a refusal."""
    return _of_each(table, lambda _, text: _matches(REFUSAL, text[:300], "refuses"))


def boilerplate(table: pa.Table, check: Boilerplate) -> Flagged:
    """Responses with set phrases of assistants."""
    return _of_each(table, lambda _, text: _matches(BOILERPLATE, text, "set phrase"))


def truncation(table: pa.Table, check: Truncation) -> Flagged:
    """Responses without a turn end, and long ones that stop inside of a sentence."""
    flagged = Flagged([], [], [])
    open_ended = without_turn_end(table)
    for row, (_, response) in enumerate(texts(table)):
        reason = None
        if open_ended[row] or table["truncated"][row].as_py():
            reason = "no turn end"
        elif len(response) > 120 and not SENTENCE_END.search(response[-40:]):
            reason = "stops inside of a sentence"
        if reason:
            flagged.rows.append(row)
            flagged.reasons.append(reason)
            flagged.details.append(response[-80:])
    return flagged


def _matches(pattern: re.Pattern[str], text: str, reason: str) -> tuple[str, str | None] | None:
    match = pattern.search(text.replace("’", "'"))
    return (reason, match[0]) if match else None


def _of_each(table: pa.Table, test: Any) -> Flagged:
    flagged = Flagged([], [], [])
    for row, (prompt, response) in enumerate(texts(table)):
        found = test(prompt, response)
        if found is not None:
            flagged.rows.append(row)
            flagged.reasons.append(found[0])
            flagged.details.append(found[1])
    return flagged


MIN_WORDS = 5
"""Evaluation items of fewer words are not looked for."""


@lru_cache(maxsize=1 << 17)
def _word_number(word: str) -> int:
    raw = word.encode()
    return zlib.crc32(raw) << 32 | zlib.adler32(raw)


def _numbers(text: str) -> npt.NDArray[np.uint64]:
    return np.array([_word_number(word) for word in WORD.findall(text.lower())], dtype=np.uint64)


def word_grams(text: str, n: int) -> npt.NDArray[np.uint64]:
    """A hash of each run of n words; none for a shorter text."""
    return _grams(_numbers(text), n)


def _grams(values: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.uint64]:
    if len(values) < n:
        return np.zeros(0, dtype=np.uint64)
    found = np.zeros(len(values) - n + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(n):
            found = (found + values[place : len(values) - n + 1 + place]) * np.uint64(0x9E3779B97F4A7C15)
            found ^= found >> np.uint64(31)
    return found


def evaluation_grams(items: Iterable[str], n: int) -> dict[int, npt.NDArray[np.uint64]]:
    """Sorted hashes of the n-grams of evaluation items; of shorter items their whole text, by its length."""
    found: dict[int, list[npt.NDArray[np.uint64]]] = {}
    for item in items:
        length = len(WORD.findall(item))
        if length >= MIN_WORDS:
            size = min(n, length)
            found.setdefault(size, []).append(word_grams(item, size))
    return {size: np.unique(np.concatenate(parts)) for size, parts in sorted(found.items())}


def _in_sorted(values: npt.NDArray[np.uint64], known: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which values [N] are among `known`, which is sorted and not empty: a binary search for each."""
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def contamination(table: pa.Table, grams: dict[int, npt.NDArray[np.uint64]]) -> Flagged:
    """Rows that hold a run of words of an evaluation item."""

    def test(prompt: str, response: str) -> tuple[str, str | None] | None:
        for where, text in (("prompt", prompt), ("response", response)):
            numbers = _numbers(text)
            for size, known in grams.items():
                found = np.flatnonzero(_in_sorted(_grams(numbers, size), known))
                if len(found):
                    words = WORD.findall(text)[int(found[0]) : int(found[0]) + size]
                    return f"evaluation item in the {where}", " ".join(words)
        return None

    return _of_each(table, test)
