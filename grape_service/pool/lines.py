"""Lines and JSON elements out of byte streams, whatever is wrong with some of them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

import orjson

from grape_service.rows.candidate import Rejection

BLOCK_BYTES = 4 * 2**20
MAX_ROW_BYTES = 256 * 2**20
"""A longer row is rejected: it would not fit the memory of a task."""
TOO_LONG = Rejection("row is too long to read", f"more than {MAX_ROW_BYTES // 2**20} MiB in one row")
BOM = codecs.BOM_UTF8
MAX_INTEGER = 2.0**63
SHOWN_CHARACTERS = 200
"""Of a rejected row, for `grape rejects`."""


def is_document(head: bytes, is_jsonl: bool) -> bool:
    """Whether a file that begins with `head` is a JSON array or one object over several lines, and not a row a line.

    The name alone does not tell: JSON Lines are often called .json, and an array sometimes .jsonl.
    """
    text = head.removeprefix(BOM).lstrip()
    if text[:1] == b"[":
        return True
    if is_jsonl or not text:
        return False
    return not any(_is_object(line) for line in text.split(b"\n", 2)[:2])


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def split_lines(file: IO[bytes], start: int = 0, end: int | None = None) -> Iterator[list[bytes | None]]:
    """Lines that begin at a byte in [start, end) of a file, in lists of some MiB, without their newline.

    None stands for a line longer than MAX_ROW_BYTES. Ranges that meet give each line exactly once.
    """
    position = start
    if start > 0:
        file.seek(start - 1)
        position = start - 1
    skipping = start > 0  # up to the first newline: that line began before
    too_long = False
    carry = b""
    while end is None or position < end:
        block = file.read(BLOCK_BYTES)
        if not block:
            break
        if skipping:
            newline = block.find(b"\n")
            if newline < 0:
                position += len(block)
                continue
            if too_long:
                yield [None]
                too_long = False
            skipping = False
            position += newline + 1
            block = block[newline + 1 :]
        pieces: list[bytes | None] = [*(carry + block).split(b"\n")]
        carry = pieces.pop() or b""
        taken: list[bytes | None] = []
        for line in pieces:
            if end is not None and position >= end:
                break
            assert line is not None
            taken.append(line)
            position += len(line) + 1
        if taken:
            yield taken
        if len(carry) > MAX_ROW_BYTES and (end is None or position < end):
            skipping = too_long = True
            position += len(carry)
            carry = b""
    if too_long:
        yield [None]
    elif carry and (end is None or position < end):
        yield [carry]


def parse_line(line: bytes | None) -> dict[str, Any] | Rejection | None:
    """A line of a .jsonl file as a row, or why it is none; None for a blank line."""
    if line is None:
        return TOO_LONG
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        if not line.strip():
            return None
        return _parse_slowly(line)
    if not isinstance(value, dict):
        return _not_an_object(value, line)
    for field in value.values():
        if type(field) is float and abs(field) >= MAX_INTEGER:  # an integer with more digits than orjson keeps
            return _parse_slowly(line)
    return value


def _parse_slowly(line: bytes) -> dict[str, Any] | Rejection:
    """What orjson refuses and Python's json writes (NaN, infinities) is read; the rest gets its reason."""
    try:
        value = json.loads(line.decode(), parse_int=_json_integer)
    except UnicodeDecodeError as error:
        return Rejection("not UTF-8", f"byte {error.start} of the line", beginning(line))
    except (ValueError, RecursionError) as error:
        return Rejection("broken JSON", str(error)[:200], beginning(line))
    return checked_row(value)


def checked_row(value: Any) -> dict[str, Any] | Rejection:
    """A parsed value, if it is an object and all its text is UTF-8."""
    if not isinstance(value, dict):
        return _not_an_object(value, json.dumps(value)[:SHOWN_CHARACTERS].encode())
    try:
        orjson.dumps(value)
    except TypeError as error:
        return Rejection("not UTF-8", str(error))
    return value


def _json_integer(digits: str) -> int | str:
    """Integers beyond 64 bits become text, so that as ids they keep every digit."""
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else digits


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


def json_elements(file: IO[bytes]) -> Iterator[dict[str, Any] | Rejection]:
    """Elements of a JSON array, or the objects one after the other that a .json file holds; streaming.

    Raises BrokenDocument where the text stops being JSON: what follows cannot be told apart.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    parser = json.JSONDecoder(parse_int=_json_integer)
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
        try:
            value, stop = parser.raw_decode(text, after)
            if in_array and count and not has_comma:
                raise BrokenDocument(f"no comma after row {count - 1}")
            if stop == len(text) and not ended:
                raise ValueError("more may follow")
        except BrokenDocument:
            raise
        except (ValueError, RecursionError) as error:
            if ended or isinstance(error, RecursionError) or len(text) - place > MAX_ROW_BYTES:
                raise BrokenDocument(f"row {count}: {error}") from None
            blocks = max(BLOCK_BYTES, len(text) - place)  # doubling keeps long rows linear
            data = file.read(blocks)
            ended = not data
            text = text[place:] + decoder.decode(data, final=ended)
            place = 0
            continue
        yield checked_row(value)
        count += 1
        place = stop


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
