"""Calls ahead of their results."""

import threading
from collections.abc import Iterator

import pytest

from grape_service.storage.concurrent_map import concurrent_map

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("number", [0, 1, 2, 20])
def test_results_come_in_order_with_a_bounded_number_ahead(number: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(number):
            taken += 1
            yield item

    for told, result in enumerate(concurrent_map(lambda item: item * item, items(), at_a_time=3)):
        assert result == told * told
        assert taken <= told + 1 + 3
    assert taken == number


def test_one_item_takes_no_thread_and_several_do() -> None:
    here = threading.get_ident()
    assert list(concurrent_map(lambda _: threading.get_ident(), [1], 4)) == [here]
    assert here not in list(concurrent_map(lambda _: threading.get_ident(), [1, 2], 4))


def test_an_exception_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(concurrent_map(lambda item: 1 // item, [1, 0, 1], 2))
