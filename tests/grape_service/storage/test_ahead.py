"""Calls ahead of their results."""

import threading
from collections.abc import Iterator

import pytest

from grape_service.storage.ahead import map_ahead


@pytest.mark.parametrize("number", [0, 1, 2, 20])
def test_results_come_in_order_with_a_bounded_number_ahead(number: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(number):
            taken += 1
            yield item

    for told, result in enumerate(map_ahead(lambda item: item * item, items(), ahead=3)):
        assert result == told * told
        assert taken <= told + 1 + 3
    assert taken == number


def test_one_item_takes_no_thread_and_several_do() -> None:
    here = threading.get_ident()
    assert list(map_ahead(lambda _: threading.get_ident(), [1], 4)) == [here]
    assert here not in list(map_ahead(lambda _: threading.get_ident(), [1, 2], 4))


def test_an_exception_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda item: 1 // item, [1, 0, 1], 2))
