"""Work that waits: what is new is made as it is asked for, what comes back goes first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class WorkQueue(Generic[T]):
    """Items in order, the first of them those that were put back. Holds none that nobody asked for yet."""

    def __init__(self, items: Iterable[T], number: int):
        """`number`: how many `items` there are."""
        self._fresh = iter(items)
        self._left = number
        self._back: deque[T] = deque()

    def __len__(self) -> int:
        return self._left + len(self._back)

    def popleft(self) -> T:
        """The next item."""
        if self._back:
            return self._back.popleft()
        self._left -= 1
        return next(self._fresh)

    def appendleft(self, item: T) -> None:
        """Put an item in front."""
        self._back.appendleft(item)
