"""Several calls at a time, for what mostly waits: for storage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def concurrent_map(function: Callable[[T], R], items: Iterable[T], at_a_time: int) -> Iterator[R]:
    """`function` of each item, in order, `at_a_time` of them at the same time; no more results than that wait.

    One item alone is called right here: a thread would cost more than a small file.
    """
    waiting = iter(items)
    first = list(islice(waiting, 2))
    if len(first) < 2:
        yield from map(function, first)
        return
    with ThreadPoolExecutor(at_a_time, thread_name_prefix="concurrent_map") as pool:
        calls: deque[Future[R]] = deque()
        for item in chain(first, waiting):
            if len(calls) == at_a_time:
                yield calls.popleft().result()
            calls.append(pool.submit(function, item))
        while calls:
            yield calls.popleft().result()
