"""How large a config may be: what is larger is no config, and is refused before anything works through it."""

from __future__ import annotations

from typing import Any

from grape_service.errors import UserError

MAX_BYTES = 2**20
MAX_DEPTH = 50
MAX_VALUES = 100_000


def check_size(values: Any, where: str) -> None:
    """Raises UserError for values nested too deeply or too many, each counted wherever an alias repeats it."""
    waiting = [(values, 1)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{where} is nested deeper than {MAX_DEPTH} levels, which no config is")
        if count > MAX_VALUES:
            raise UserError(f"{where} holds more than {MAX_VALUES:,} values, which no config does")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        waiting += [(item, depth + 1) for item in inner]
