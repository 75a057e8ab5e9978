"""One type for each of a pool's other columns, joined over all rows whatever their order.

A kind is a JSON value: a name ("null", "bool", "int", "bigint", "float", "string", "json"), the name of an
Arrow type that JSON lacks ("timestamp[us]", "binary"), {"list": kind} or {"struct": {name: kind}}. `join` is
commutative and associative with "null" as its bottom and "json", mixed types, as its top.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

Kind = str | dict[str, Any]

EXACT_IN_FLOAT = 2**53
SCALARS = {
    "null": pa.string(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "bigint": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "json": pa.string(),
}


def kind_of(value: Any) -> Kind:
    """The kind of one JSON value."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if abs(value) <= EXACT_IN_FLOAT:
            return "int"
        return "bigint" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list):
        element: Kind = "null"
        for one in value:
            element = join(element, kind_of(one))
        return "json" if element == "json" else {"list": element}
    assert isinstance(value, dict)
    fields = {name: kind_of(value[name]) for name in sorted(value)}
    return "json" if not fields or "json" in fields.values() else {"struct": fields}


def join(one: Kind, other: Kind) -> Kind:
    """The kind that holds the values of both; "json" where none does without a loss."""
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    pair = {one, other} if isinstance(one, str) and isinstance(other, str) else set()
    if pair == {"int", "bigint"}:
        return "bigint"
    if pair == {"int", "float"}:
        return "float"
    if isinstance(one, dict) and isinstance(other, dict):
        if "list" in one and "list" in other:
            element = join(one["list"], other["list"])
            return "json" if element == "json" else {"list": element}
        if "struct" in one and "struct" in other and one["struct"].keys() == other["struct"].keys():
            fields = {name: join(one["struct"][name], other["struct"][name]) for name in one["struct"]}
            return "json" if "json" in fields.values() else {"struct": fields}
    return "json"


def join_columns(into: dict[str, Kind], columns: dict[str, Kind]) -> None:
    """Join the kinds of more rows into those of the rows before."""
    for name, kind in columns.items():
        into[name] = join(into.get(name, "null"), kind)


def arrow_type(kind: Kind) -> pa.DataType:
    """The Arrow type of a column of that kind."""
    if isinstance(kind, str):
        return SCALARS.get(kind) or _arrow_type_of_name(kind)
    if "list" in kind:
        return pa.list_(arrow_type(kind["list"]))
    return pa.struct([pa.field(name, arrow_type(field)) for name, field in kind["struct"].items()])


def to_array(values: list[Any], kind: Kind) -> pa.Array:
    """JSON values of kinds whose join is `kind` as a column; "json" writes every value but null as JSON text."""
    if kind == "json":
        texts = [None if value is None else orjson.dumps(value, option=orjson.OPT_SORT_KEYS) for value in values]
        return pa.array([None if text is None else text.decode() for text in texts], pa.string())
    if kind == "binary":
        return pa.array([None if value is None else base64.b64decode(value) for value in values], pa.binary())
    if isinstance(kind, str) and kind not in SCALARS:
        return pc.cast(pa.array(values, pa.string()), _arrow_type_of_name(kind))
    return pa.array(values, arrow_type(kind))


# Arrow types that JSON lacks travel as text under their name.


def arrow_kind(data_type: pa.DataType) -> str | None:
    """The kind of a Parquet column whose type JSON lacks, or None for one that JSON has."""
    if pa.types.is_dictionary(data_type):
        return arrow_kind(data_type.value_type)
    if is_bytes(data_type):
        return "binary"
    if pa.types.is_timestamp(data_type):
        return f"timestamp[{data_type.unit}]" + (f" {data_type.tz}" if data_type.tz else "")
    if pa.types.is_date(data_type):
        return "date32"
    if pa.types.is_decimal(data_type):
        return f"decimal {data_type.precision} {data_type.scale}"
    return None


def _arrow_type_of_name(kind: str) -> pa.DataType:
    if kind == "binary":
        return pa.binary()
    if kind.startswith("timestamp["):
        unit, _, zone = kind.removeprefix("timestamp[").partition("]")
        return pa.timestamp(unit, zone.strip() or None)
    if kind.startswith("decimal "):
        precision, scale = kind.split()[1:]
        return (
            pa.decimal256(int(precision), int(scale))
            if int(precision) > 38
            else pa.decimal128(int(precision), int(scale))
        )
    assert kind == "date32", kind
    return pa.date32()


def is_bytes(data_type: pa.DataType) -> bool:
    """Whether values of a type are bytes: binary, and text whose writer did not say that it is text."""
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(data_type) for is_kind in kinds)


def as_text(column: pa.Array) -> list[str | None]:
    """A column of bytes as text. Raises UnicodeDecodeError where it is not UTF-8."""
    return [None if value is None else value.decode() for value in _plain_encoding(column).to_pylist()]


def as_json_values(column: pa.Array) -> list[Any]:
    """A Parquet column's values as JSON values; what JSON lacks as text, and JSON text as what it says."""
    column = _plain_encoding(column)
    data_type = column.type
    parse = _json_parser(data_type)
    if parse is not None:
        return [None if value is None else parse(_plain(value)) for value in column.to_pylist()]
    if isinstance(data_type, pa.UuidType):
        return [None if value is None else str(value) for value in column.to_pylist()]
    if isinstance(data_type, pa.BaseExtensionType):
        return as_json_values(column.storage)
    kind = arrow_kind(data_type)
    if kind == "binary":
        return [None if value is None else base64.b64encode(value).decode() for value in column.to_pylist()]
    if kind is not None:
        return pc.cast(pc.cast(column, _arrow_type_of_name(kind)), pa.string()).to_pylist()
    if pa.types.is_time(data_type):
        return pc.cast(column, pa.string()).to_pylist()
    if pa.types.is_float16(data_type) or pa.types.is_duration(data_type):
        return pc.cast(column, pa.float32() if pa.types.is_float16(data_type) else pa.int64()).to_pylist()
    values = column.to_pylist()
    return values if _is_json_scalar(data_type) else [_plain(value) for value in values]


def _plain_encoding(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode()
    return pc.run_end_decode(column) if pa.types.is_run_end_encoded(column.type) else column


def _is_json_scalar(data_type: pa.DataType) -> bool:
    kinds = (
        pa.types.is_null,
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
    )
    return any(is_kind(data_type) for is_kind in kinds)


def _json_parser(data_type: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes JSON values of a type's values where it holds Arrow's JSON type (datasets' Json), at any depth."""
    if isinstance(data_type, pa.JsonType):
        return _parsed
    if isinstance(data_type, pa.BaseExtensionType):
        return _json_parser(data_type.storage_type)
    if pa.types.is_dictionary(data_type):
        return _json_parser(data_type.value_type)
    if pa.types.is_struct(data_type):
        fields = {field.name: parse for field in data_type if (parse := _json_parser(field.type)) is not None}
        return (lambda value: _with_parsed(value, fields)) if fields else None
    if pa.types.is_nested(data_type) and hasattr(data_type, "value_type") and not pa.types.is_map(data_type):
        parse = _json_parser(data_type.value_type)
        return (lambda value: [None if one is None else parse(one) for one in value]) if parse is not None else None
    return None


def _with_parsed(value: dict[str, Any], fields: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    parsed = {name: parse(value[name]) for name, parse in fields.items() if value[name] is not None}
    return {**value, **parsed}


def _parsed(text: Any) -> Any:
    try:
        return orjson.loads(text)
    except (TypeError, orjson.JSONDecodeError):  # not made by Arrow, which checks nothing
        return text


def _plain(value: Any) -> Any:
    """A value of a nested column as JSON: bytes that are text as text, others as base64; a map as an object."""
    if isinstance(value, list | tuple):
        if value and all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value):
            return {name: _plain(field) for name, field in value}
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        return {name: _plain(field) for name, field in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return value if value is None or isinstance(value, str | int | float) else str(value)
