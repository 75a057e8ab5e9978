import pytest

from grape_service.config.pool import Filter
from grape_service.pool.filters import nearest, passes
from grape_service.pool.lines import LongInteger
from grape_service.pool.messages import Unusable

pytestmark = pytest.mark.quick

NAN = float("nan")


@pytest.mark.parametrize(
    ("condition", "passing", "failing"),
    [
        ({"equals": True}, [True, "true", "True", 1], [False, None, "false", 0]),
        ({"equals": None}, [None], [0, "", [1]]),
        ({"not_equals": "x"}, ["y", None], ["x"]),
        ({"not_equals": False}, [True, "True", None], [False, "FALSE", 0]),
        ({"one_of": ["a", 3]}, ["a", 3, "3"], ["b", None, 4]),
        ({"equals": 9007199254740993}, [9007199254740993, "9007199254740993"], [9007199254740992, "9007199254740992"]),
        ({"equals": "7"}, ["7", 7], ["7.0", 8]),
        ({"equals": 2**70 + 1}, [str(2**70 + 1), LongInteger(2**70 + 1)], [LongInteger(2**70)]),
        ({"one_of": [3, 2**70]}, [3, LongInteger(2**70)], [4, LongInteger(2**70 + 1)]),
        ({"at_least": 2**53 + 1}, [2**53 + 1, str(2**53 + 1)], [2**53, str(2**53)]),
        ({"at_most": 2**70}, [1, LongInteger(2**70)], [LongInteger(2**71)]),
        ({"at_least": 0.5}, [0.5, 1, True, "1", "0.50", " .75 ", "5e-1"], [0.4, None, "0.49", NAN]),
        ({"at_most": 3}, [3, -1.5, "-1.5"], [3.01, None, NAN]),
        ({"at_least": 1, "at_most": 2, "not_equals": 1.5}, [1, 2], [0, 3, 1.5]),
    ],
)
def test_conditions(condition, passing, failing):
    filters = [Filter(column="c", **condition)]
    assert [value for value in [*passing, *failing] if passes({"c": value}, filters)] == passing
    assert not passes({"other": 1}, filters)


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        ({"equals": True}, [True]),
        ({"equals": True}, "yes"),
        ({"not_equals": False}, {"correct": True}),
        ({"equals": "math"}, ["math"]),
        ({"one_of": ["math", "code"]}, ["math"]),
        ({"equals": 1}, "one"),
        ({"equals": "one"}, 1),
        ({"at_least": 0.5}, "high"),
        ({"at_most": 0.5}, [0.1]),
        ({"at_least": 0.5}, "0.5 of 1"),
    ],
)
def test_a_value_that_cannot_be_compared_is_no_silent_false(condition, value):
    with pytest.raises(Unusable, match=r"pool.where cannot compare a value") as error:
        passes({"c": value}, [Filter(column="c", **condition)])
    assert "'c' is " in error.value.rejection.detail


def test_every_filter_has_to_pass():
    filters = [Filter(column="a", equals=1), Filter(column="b", equals=2)]
    assert passes({"a": 1, "b": 2}, filters)
    assert not passes({"a": 1, "b": 3}, filters)


def test_the_nearest_name():
    assert nearest("corect", ["source", "correct"]) == "correct"
    assert nearest("Prompt", ["prompt_text", "id"]) == "prompt_text"
    assert nearest("zzz", ["source"]) is None
