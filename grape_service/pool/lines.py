"""Lines and JSON elements out of byte streams, whatever is wrong with some of them."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

import orjson

from grape_service.rows.candidate import Rejection, Row

BLOCK_BYTES = 4 * 2**20
MAX_ROW_BYTES = 256 * 2**20
"""The default of pool.max_row_bytes."""
MAX_NESTED = 100
"""Lists and objects in one another: what is nested deeper cannot be written as JSON again, nor rendered."""
TOO_DEEP = Rejection("row is nested too deep", f"more than {MAX_NESTED} lists and objects in one another")
BOM = codecs.BOM_UTF8
MAX_INTEGER = 2.0**63
REPEATED_KEY = "a key stands twice"
SHOWN_CHARACTERS = 200
"""Of a rejected row, for `grape rejects`."""


def is_document(head: bytes, is_jsonl: bool) -> bool:
    """Whether a file that begins with `head` is a JSON array or one object over several lines, and not a row a line.

    The name alone does not tell: JSON Lines are often called .json, and an array sometimes .jsonl.
    """
    text = head.removeprefix(BOM).lstrip()
    if text[:1] == b"[":
        first, _, rest = text.partition(b"\n")
        return not (rest.strip() and _is_json(first))  # a line that is not a row, before others
    if is_jsonl or not text:
        return False
    return not any(_is_object(line) for line in text.split(b"\n", 2)[:2])


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def too_long(max_bytes: int) -> Rejection:
    """What becomes of a row that does not fit the memory of a task."""
    return Rejection("row is too long to read", f"more than pool.max_row_bytes, {max_bytes:,}, in one row")


def nested_too_deep(value: Any) -> bool:
    """Whether more than MAX_NESTED lists and objects are in one another; told level by level, without recursion."""
    level = [value]
    for _ in range(MAX_NESTED + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        if not inner:
            return False
        level = [child for children in inner for child in children if isinstance(child, dict | list)]
    return True


def load_json(text: str | bytes) -> Any:
    """The value of a JSON text, with every digit of its integers. Raises ValueError for other texts, and for what is
    nested too deep."""
    value = orjson.loads(text)
    if _many_brackets(text) and nested_too_deep(value):
        raise ValueError(TOO_DEEP.detail)
    return json.loads(text, parse_int=_json_integer) if _has_long_number(value) else value


def _many_brackets(text: str | bytes) -> bool:
    """Whether a value can be nested too deep at all, which nearly none can."""
    if isinstance(text, bytes):
        return text.count(b"[") + text.count(b"{") > MAX_NESTED
    return text.count("[") + text.count("{") > MAX_NESTED


def split_lines(
    file: IO[bytes], start: int = 0, end: int | None = None, max_row_bytes: int = MAX_ROW_BYTES
) -> Iterator[list[bytes | None]]:
    """Lines that begin at a byte in [start, end) of a file, in lists of some MiB, without their newline.

    None stands for a line longer than `max_row_bytes`. Ranges that meet give each line exactly once.
    """
    position = start
    if start > 0:
        file.seek(start - 1)
        position = start - 1
    skipping = start > 0  # up to the first newline: that line began before
    cut = False
    begun: list[bytes] = []  # pieces of a line whose newline has not been seen: each byte is copied and searched once
    num_begun = 0
    while end is None or position < end:
        block = file.read(BLOCK_BYTES)
        if not block:
            break
        if skipping:
            newline = block.find(b"\n")
            if newline < 0:
                position += len(block)
                continue
            if cut:
                yield [None]
                cut = False
            skipping = False
            position += newline + 1
            block = block[newline + 1 :]
        first, *more = block.split(b"\n")
        begun.append(first)
        num_begun += len(first)
        lines = [b"".join(begun), *more[:-1]] if more else []
        if more:
            begun, num_begun = [more[-1]], len(more[-1])
        taken: list[bytes | None] = []
        for line in lines:
            if end is not None and position >= end:
                break
            taken.append(line if len(line) <= max_row_bytes else None)
            position += len(line) + 1
        if taken:
            yield taken
        if num_begun > max_row_bytes and (end is None or position < end):
            skipping = cut = True
            position += num_begun
            begun, num_begun = [], 0
    if cut:
        yield [None]
    elif num_begun and (end is None or position < end):
        yield [b"".join(begun)]


def parse_line(line: bytes | None, max_row_bytes: int = MAX_ROW_BYTES) -> Row | Rejection | None:
    """A line of a .jsonl file as a row, or why it is not one; None for a blank line."""
    if line is None:
        return too_long(max_row_bytes)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        if not line.strip():
            return None
        return _parse_slowly(line)
    if _many_brackets(line) and nested_too_deep(value):
        return replace(TOO_DEEP, text=beginning(line))
    if not isinstance(value, dict):
        return _not_an_object(value, line)
    if line.count(b'":') - line.count(b'\\":') != _num_keys(value):  # or the text has other signs around a key
        return _parse_slowly(line)
    for field in value.values():
        kind = type(field)
        if kind is not str and kind is not int and _has_long_number(field):
            return _parse_slowly(line)
    return value


def _num_keys(value: Any) -> int:
    """Keys of the objects in a value, at every depth; of a list that begins with a number or a text there are none."""
    if type(value) is dict:
        number = len(value)
        for one in value.values():
            if type(one) is dict or (type(one) is list and one and type(one[0]) in (dict, list)):
                number += _num_keys(one)
        return number
    return sum(_num_keys(one) for one in value if type(one) in (dict, list))


class _Objects:
    """Makes objects for a parser, and sees those that have two values under one name, of which the last is kept."""

    def __init__(self) -> None:
        self.repeated: list[str] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _ in pairs]
            self.repeated += [name for name in value if names.count(name) > 1]
        return value

    def problem(self) -> Rejection | None:
        """The rejection of what was parsed since the last call."""
        found, self.repeated = self.repeated, []
        return Rejection(REPEATED_KEY, f"'{found[0]}' has two values in one object") if found else None


def _has_long_number(value: Any) -> bool:
    """Whether a value holds, at any depth, what may be an integer with more digits than orjson keeps."""
    if type(value) is float:
        return abs(value) >= MAX_INTEGER
    if type(value) is dict:
        return any(map(_has_long_number, value.values()))
    if type(value) is not list or not value:
        return False
    if type(value[0]) in (int, float):
        with contextlib.suppress(TypeError):  # some are not numbers
            return max(value) >= MAX_INTEGER or min(value) <= -MAX_INTEGER
    return any(map(_has_long_number, value))


def _parse_slowly(line: bytes) -> Row | Rejection:
    """What orjson refuses and Python's json writes (NaN, infinities) is read; the rest gets its reason."""
    try:
        value = json.loads(line.decode(), parse_int=_json_integer, object_pairs_hook=(objects := _Objects()))
    except UnicodeDecodeError as error:
        return Rejection("not UTF-8", f"byte {error.start} of the line", beginning(line))
    except (ValueError, RecursionError) as error:
        return Rejection("broken JSON", str(error)[:200], beginning(line))
    problem = objects.problem()
    return checked_row(value) if problem is None else replace(problem, text=beginning(line))


def checked_row(value: Any) -> Row | Rejection:
    """A parsed value, if it is an object, not nested too deep, and all its text is UTF-8."""
    if nested_too_deep(value):
        return TOO_DEEP
    if not isinstance(value, dict):
        return _not_an_object(value, json.dumps(value)[:SHOWN_CHARACTERS].encode())
    try:
        orjson.dumps(value)
    except TypeError as error:
        return Rejection("not UTF-8", str(error))
    return value


class LongInteger(str):
    """An integer beyond 64 bits as its digits, so that as an id it keeps each of them."""

    __slots__ = ()


def _json_integer(digits: str) -> int | LongInteger:
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else LongInteger(digits)


def holds_long_integer(value: Any) -> bool:
    """Whether there is a LongInteger in a value, at any depth."""
    if isinstance(value, dict):
        return any(map(holds_long_integer, value.values()))
    return any(map(holds_long_integer, value)) if isinstance(value, list) else isinstance(value, LongInteger)


def _not_an_object(value: Any, text: bytes) -> Rejection:
    return Rejection("row is not an object", f"it is a JSON {_json_type(value)}", beginning(text))


def beginning(text: bytes | str) -> str:
    """The first characters of a row, to be shown."""
    if isinstance(text, bytes):
        text = text[: 4 * SHOWN_CHARACTERS].decode(errors="replace")
    return text[:SHOWN_CHARACTERS]


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)


class BrokenDocument(ValueError):
    """A .json file that cannot be read to its end."""


def json_elements(file: IO[bytes], max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Row | Rejection]:
    """Elements of a JSON array, or the objects one after the other that a .json file holds; streaming.

    Raises BrokenDocument where the text stops being JSON: what follows cannot be told apart.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    objects = _Objects()
    parser = json.JSONDecoder(parse_int=_json_integer, object_pairs_hook=objects)
    text = decoder.decode(file.read(BLOCK_BYTES)).removeprefix("\ufeff").lstrip()
    if not text:
        return
    in_array = text[0] == "["
    place = 1 if in_array else 0
    ended = False
    count = 0
    while True:
        place = _after_space(text, place)
        has_comma = in_array and count > 0 and text[place : place + 1] == ","
        after = _after_space(text, place + 1) if has_comma else place
        if in_array and not has_comma and text[after : after + 1] == "]":
            _only_space(text[after + 1 :], decoder, file)
            return
        if not in_array and ended and after == len(text):
            return
        objects.problem()  # of a text that had not come to its end
        try:
            value, stop = parser.raw_decode(text, after)
            if in_array and count and not has_comma:
                raise BrokenDocument(f"no comma after row {count}")
            if stop == len(text) and not ended:
                raise ValueError("more may follow")
        except BrokenDocument:
            raise
        except (ValueError, RecursionError) as error:
            is_too_long = len(text) - place > max_row_bytes and not ended
            if ended or is_too_long or isinstance(error, RecursionError):
                problem = too_long(max_row_bytes).detail if is_too_long else error
                raise BrokenDocument(f"row {count + 1}: {problem}") from None
            long = len(text) - place  # so far; doubling keeps long rows linear
            data = file.read(BLOCK_BYTES) if long < BLOCK_BYTES else _read(file, long)
            ended = not data
            text = text[place:] + decoder.decode(data, final=ended)
            place = 0
            continue
        yield objects.problem() or checked_row(value)
        count += 1
        place = stop


def _read(file: IO[bytes], size: int) -> bytes:
    """At least `size` bytes, where there are so many: what decompresses gives fewer at a time."""
    parts = []
    while size > 0 and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _only_space(rest: str, decoder: codecs.IncrementalDecoder, file: IO[bytes]) -> None:
    while True:
        if rest.strip():
            raise BrokenDocument("there is more text after the JSON value")
        data = file.read(BLOCK_BYTES)
        if not data:
            return
        rest = decoder.decode(data)
