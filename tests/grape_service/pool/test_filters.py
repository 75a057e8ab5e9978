import pytest

from grape_service.config.schema import Filter
from grape_service.pool.filters import nearest, passes

NAN = float("nan")


@pytest.mark.parametrize(
    ("condition", "passing", "failing"),
    [
        ({"equals": True}, [True], [False, None, "true"]),
        ({"equals": None}, [None], [0, ""]),
        ({"not_equals": "x"}, ["y", None, 1], ["x"]),
        ({"one_of": ["a", 3]}, ["a", 3], ["b", None, 4, ["a"]]),
        ({"at_least": 0.5}, [0.5, 1, True], [0.4, None, "1", NAN]),
        ({"at_most": 3}, [3, -1.5], [3.01, None, NAN]),
        ({"at_least": 1, "at_most": 2, "not_equals": 1.5}, [1, 2], [0, 3, 1.5]),
    ],
)
def test_conditions(condition, passing, failing):
    filters = [Filter(column="c", **condition)]
    assert [value for value in [*passing, *failing] if passes({"c": value}, filters)] == passing
    assert not passes({"other": 1}, filters)


def test_every_filter_has_to_pass():
    filters = [Filter(column="a", equals=1), Filter(column="b", equals=2)]
    assert passes({"a": 1, "b": 2}, filters)
    assert not passes({"a": 1, "b": 3}, filters)


def test_the_nearest_name():
    assert nearest("corect", ["source", "correct"]) == "correct"
    assert nearest("Prompt", ["prompt_text", "id"]) == "prompt_text"
    assert nearest("zzz", ["source"]) is None
