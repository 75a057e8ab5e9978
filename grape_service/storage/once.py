"""Work that is done once: a small JSON file, written last, says that it is done and what it counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grape_service.storage.storage import Storage


def once(storage: Storage, path: str, work: Callable[[], Any], is_there: Callable[[Any], bool]) -> Any:
    """The JSON value at `path`; where there is none, or `is_there(value)` says that a file which was written with it is
    gone, what `work` gives, written there.

    A task that is killed and started again finds what it had finished. Where another run of the same work is faster
    and deletes what `work` reads, so that it raises FileNotFoundError, the other's value is taken.
    """
    value = _read(storage, path, is_there)
    if value is None:
        try:
            value = work()
        except FileNotFoundError:
            value = _read(storage, path, is_there)
            if value is None:
                raise
        else:
            storage.write_json(path, value)
    return value


def _read(storage: Storage, path: str, is_there: Callable[[Any], bool]) -> Any:
    try:
        value = storage.read_json_value(path)
    except FileNotFoundError:
        return None
    return value if is_there(value) else None
