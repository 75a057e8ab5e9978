import datetime
import decimal

import orjson
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape_service.pool.column_types import arrow_kind, as_json_values, join, kind_of, to_array

pytestmark = pytest.mark.quick

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


@given(VALUES, VALUES, VALUES)
def test_kinds_join_in_any_order(a, b, c):
    one, two, three = map(kind_of, (a, b, c))
    assert join(one, two) == join(two, one)
    assert join(join(one, two), three) == join(one, join(two, three))
    assert join(one, one) == one
    assert join(one, "null") == one
    assert join(one, "json") == "json"


@given(st.lists(VALUES, max_size=5))
def test_a_column_holds_its_values_without_loss(values):
    kind = "null"
    for value in values:
        kind = join(kind, kind_of(value))
    found = to_array(values, kind).to_pylist()
    if kind == "json":
        found = [None if text is None else orjson.loads(text) for text in found]
    assert found == values


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, 2.5, None], "float", [1.0, 2.5, None]),
        ([2**60, 0.5], "json", [str(2**60), "0.5"]),
        ([1, "a", True], "json", ["1", '"a"', "true"]),
        ([{"b": 1, "a": 2}, {"a": 3}], "json", ['{"a":2,"b":1}', '{"a":3}']),
        ([{"a": 1}, {"a": 0.5}], {"struct": {"a": "float"}}, [{"a": 1.0}, {"a": 0.5}]),
        ([[1], [], None], {"list": "int"}, [[1], [], None]),
        ([["a"], [1]], "json", ['["a"]', "[1]"]),
        ([None], "null", [None]),
        ([{}], "json", ["{}"]),
    ],
)
def test_mixed_types_become_json_text(values, kind, expected):
    found = "null"
    for value in values:
        found = join(found, kind_of(value))
    assert found == kind
    assert to_array(values, kind).to_pylist() == expected


@pytest.mark.parametrize(
    ("values", "data_type"),
    [
        ([datetime.datetime(2024, 2, 29, 12, 30, 1, 5), None], pa.timestamp("us")),
        ([datetime.datetime(1969, 1, 1, 3, tzinfo=datetime.UTC)], pa.timestamp("ms", "Europe/Berlin")),
        ([datetime.date(2024, 2, 29), None], pa.date32()),
        ([decimal.Decimal("1.50"), decimal.Decimal("-0.01"), None], pa.decimal128(9, 2)),
        ([b"\0\xff", None], pa.binary()),
        (["a", "b", "a", None], pa.dictionary(pa.int8(), pa.string())),
        ([1, None], pa.int8()),
        ([0.5, None], pa.float16()),
        ([[1, 2], None], pa.large_list(pa.int16())),
    ],
)
def test_parquet_types_come_back_as_they_were(values, data_type):
    column = pa.array(values, data_type)
    as_json = orjson.loads(orjson.dumps(as_json_values(column)))
    kind = "null"
    for value in as_json:
        kind = join(kind, kind_of(value) if value is None else arrow_kind(data_type) or kind_of(value))
    found = to_array(as_json, kind)
    assert found.to_pylist() == values
    if arrow_kind(data_type) is not None:
        assert found.type == data_type


def test_a_time_of_day_and_what_lists_hold_are_text():
    assert as_json_values(pa.array([datetime.time(23, 59, 59)], pa.time32("s"))) == ["23:59:59"]
    assert as_json_values(pa.array([[datetime.date(2024, 2, 29)]], pa.list_(pa.date32()))) == [["2024-02-29"]]
