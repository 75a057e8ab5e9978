import io
import itertools
import json
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape_service.pool import lines
from grape_service.pool.lines import BrokenDocument, is_document, json_elements, parse_line, split_lines
from grape_service.pool.messages import parsed_json
from grape_service.rows.candidate import Rejection

pytestmark = pytest.mark.quick


def read_ranges(data: bytes, cuts: list[int], most: int = lines.MAX_ROW_BYTES) -> list[bytes | None]:
    bounds = [0, *sorted(cuts), len(data)]
    return [
        line
        for start, end in itertools.pairwise(bounds)
        for block in split_lines(io.BytesIO(data), start, end, most)
        for line in block
    ]


TEXTS = st.sampled_from(["", "a", '{"x": 1}\r', "é\u2028漢字", "😀" * 3, "long " * 7])


@given(
    texts=st.lists(TEXTS, max_size=12),
    final_newline=st.booleans(),
    shares=st.lists(st.floats(0, 1), max_size=6),
    block=st.sampled_from([1, 2, 7, 64]),
)
def test_byte_ranges_that_meet_give_each_line_once(texts, final_newline, shares, block):
    data = "\n".join(texts).encode() + (b"\n" if final_newline and texts else b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        found = read_ranges(data, [int(share * len(data)) for share in shares])
    expected = data.split(b"\n")
    assert found == (expected[:-1] if expected[-1] == b"" else expected)


@pytest.mark.parametrize("cuts", [[], [5], [12], [40], [5, 12, 13, 30]])
def test_a_line_that_is_too_long_is_one_row_and_the_others_are_read(monkeypatch, cuts):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 4)
    assert read_ranges(b"one\n" + b"x" * 40 + b"\ntwo\nthree\n", cuts, 10) == [b"one", None, b"two", b"three"]
    assert read_ranges(b"one\n" + b"x" * 40, cuts, 10) == [b"one", None]
    monkeypatch.setattr(lines, "BLOCK_BYTES", 2**20)  # a whole line that is too long, in one block
    assert read_ranges(b"one\n" + b"x" * 40 + b"\ntwo\nthree\n", cuts, 10) == [b"one", None, b"two", b"three"]


class Drop(io.BytesIO):
    """Gives little at a time, as what decompresses does."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, 1024))


def test_a_long_element_of_a_compressed_document_takes_time_in_proportion_to_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was parsed from its beginning with each KiB: an element of 256 MiB kept `grape check` for minutes."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 2**14)
    long = "x" * 2**23
    began = time.process_time()
    rows = [{"a": 1}, {"a": long}, {"a": 2}]
    assert list(json_elements(Drop(json.dumps(rows).encode()))) == rows
    with pytest.raises(BrokenDocument, match=r"row 2: more than pool\.max_row_bytes, 1,000,000, in one row"):
        list(json_elements(Drop(f'[{{"a": 1}}, {{"a": "{long}"}}]'.encode()), 10**6))
    assert time.process_time() - began < 1


def test_a_line_of_many_blocks_takes_time_in_proportion_to_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its beginning was copied and searched again with each block: a row of 256 MiB took 7 s, now half of one."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1024)
    long = b"x" * 2**23
    began = time.process_time()
    assert read_ranges(long + b"\nb\n" + long, []) == [long, b"b", long]
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a"', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": "text"}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\\ud800"}', "not UTF-8"),
        (b'{"a": {"\\udfff": 1}}', "not UTF-8"),
        (b"[1, 2]", "row is not an object"),
        (b"null", "row is not an object"),
        (b"NaN", "row is not an object"),
        (None, "row is too long to read"),
    ],
)
def test_a_line_that_is_no_row_has_its_reason(line, reason):
    row = parse_line(line)
    assert isinstance(row, Rejection)
    assert row.reason == reason


@pytest.mark.parametrize("line", [b"", b"  ", b"\r", b"\t"])
def test_a_blank_line_is_no_row(line):
    assert parse_line(line) is None


def test_what_other_programs_write_is_read():
    assert parse_line(b'{"a": [1, -Infinity], "b": "\\u00e9\\u0000"}\r') == {"a": [1, float("-inf")], "b": "é\0"}
    row = parse_line(b'{"a": NaN, "b": 123456789012345678901234567890, "c": 18446744073709551615}')
    assert isinstance(row, dict)
    assert row["b"] == "123456789012345678901234567890", "no digit is lost"
    assert row["c"] == 2**64 - 1


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.none() | st.integers(-9, 9) | st.text(max_size=5))),
    indent=st.sampled_from([None, 1]),
    block=st.sampled_from([3, 16, 1000]),
)
def test_a_json_array_is_read_as_a_stream(rows, indent, block):
    data = json.dumps(rows, indent=indent, ensure_ascii=False).encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        assert list(json_elements(io.BytesIO(data))) == json.loads(data)


def test_a_json_file_may_hold_one_object_or_nothing():
    assert list(json_elements(io.BytesIO(b' {"a": 1}\n'))) == [{"a": 1}]
    assert list(json_elements(io.BytesIO(b"\xef\xbb\xbf[{}]"))) == [{}]
    assert list(json_elements(io.BytesIO(b"  "))) == []


def test_objects_one_after_the_other_are_rows_each():
    assert list(json_elements(io.BytesIO(b'{"a": 1} {"a": 2}\n\n{"a": 3}\n'))) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        (b'{"a": 1}\n{"a": 2}\n', ".json", False),
        (b'\n {"a": 1}\n', ".json", False),
        (b'{"a": \n{"a": 2}\n{"a": 3}', ".json", False),
        (b'{\n  "a": 1\n}', ".json", True),
        (b'[\n{"a": 1}\n]', ".json", True),
        (b'[{"a": 1}]', ".jsonl", True),
        (lines.BOM + b' [{"a": 1}]', ".jsonl", True),
        (b'{"a": 1', ".jsonl", False),
        (b"", ".json", False),
    ],
)
def test_a_file_is_read_for_what_it_holds_not_for_its_name(head, name, expected):
    assert is_document(head, name == ".jsonl") is expected


def test_rows_of_a_json_array_that_are_none_are_rejected_alone():
    data = b'[{"a": 1}, 3, {"a": "\xff"}, {"a": "\\ud800"}, {"a": 2}]'
    found = [row.reason if isinstance(row, Rejection) else row for row in json_elements(io.BytesIO(data))]
    assert found == [{"a": 1}, "row is not an object", "not UTF-8", "not UTF-8", {"a": 2}]


@pytest.mark.parametrize("text", [b'[{"a": 1}, {"a"', b"[{} {}]", b"[{},]", b"[{}", b"{} {", b"{} x", b"[] x", b"["])
def test_a_json_file_that_stops_being_json_is_an_error(text):
    with pytest.raises(BrokenDocument):
        list(json_elements(io.BytesIO(text)))


@pytest.mark.parametrize("depth", [101, 400, 900, 1020, 5000, 100_000])
@pytest.mark.parametrize(("start", "end"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_row_that_is_nested_too_deep_is_a_reject(depth: int, start: bytes, end: bytes) -> None:
    line = b'{"prompt": "q", "meta": ' + start * depth + b"1" + end * depth + b"}"
    row = parse_line(line)
    assert isinstance(row, Rejection)
    assert row.reason in ("row is nested too deep", "broken JSON")  # beyond 1,024 levels no parser goes
    if depth < 900:  # Python's own parser gives up there
        assert next(json_elements(io.BytesIO(line))) == lines.TOO_DEEP
    with pytest.raises(ValueError, match=r".+"):
        lines.load_json(line)


def test_many_brackets_alone_are_no_depth() -> None:
    line = json.dumps({"prompt": "\\frac{1}{2} " * 200, "messages": [[n] for n in range(300)]}).encode()
    assert parse_line(line) == lines.load_json(line) == json.loads(line)
    deepest = b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}"
    assert isinstance(parse_line(deepest), dict)
    assert orjson.dumps(parse_line(deepest))


@pytest.mark.parametrize("digits", ["123456789012345678901234", "18446744073709551616", "-99999999999999999999"])
def test_integers_keep_every_digit_at_every_depth(digits):
    line = f'{{"id": {digits}, "meta": {{"ids": [{digits}, 7], "name": "{digits}"}}, "x": 0.1234567890123456789}}'
    row = parse_line(line.encode())
    assert row == {"id": digits, "meta": {"ids": [digits, 7], "name": digits}, "x": 0.12345678901234568}
    assert parsed_json(line) == row
    assert parse_line(b'{"meta": {"id": 18446744073709551615}}') == {"meta": {"id": 2**64 - 1}}


REPEATED = [
    b'{"prompt": "a", "response": "b", "response": "c"}',
    b'{"prompt" : "a", "response" : "b", "response" : "b"}',
    b'{"prompt": [{"role": "user", "role": "user", "content": "a"}], "response": "b"}',
    b'{"prompt": "a", "response": "says \\":", "score": [[{"a": 1, "a": 2}]]}',
]


@pytest.mark.parametrize("line", REPEATED)
def test_a_key_that_stands_twice_is_a_reject(line):
    other = b'{"prompt": "a", "response": "b"}'
    assert parse_line(line).reason == lines.REPEATED_KEY
    first, second = json_elements(io.BytesIO(b"[" + line + b",\n" + other + b"]"))
    assert first.reason == lines.REPEATED_KEY
    assert second == json.loads(other)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 'a "key": 1, "key": 2', "response": ':"', '"': ":", "x\\": {"x\\": [{"y": 1}, {"y": 2}]}},
        {"messages": [{"role": "user", "content": '{"a": 1}'}, {"role": "assistant", "content": ":"}], "n": [[1], [2]]},
        {"mixed": [1, {"a": 1}, {"a": [None, {"a": 2}]}]},
    ],
)
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":"), (" , ", " : ")])
def test_keys_in_different_objects_and_in_texts_are_no_repetition(row, separators):
    assert parse_line(json.dumps(row, separators=separators).encode()) == row
