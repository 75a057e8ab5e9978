"""The user's functions that judge answers for RL, and where they are imported from."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grape_service.config.own_methods import function_at
from grape_service.errors import UserError

RewardFunction = Callable[[Any, str, dict[str, Any]], float]
"""(prompt as chat messages, text of the response, other columns of the row) to a number."""


def imported(path: str, working_dir: str | None = None) -> RewardFunction:
    """The function at module:name, with a job's working folder as the first place of imports, as it is in the job.

    Raises UserError where it cannot be imported, is no function, or does not take (prompt, response, row).
    """
    with _importable(working_dir):
        function = function_at(path, f"train.rl.rewards '{path}'")
    try:
        inspect.signature(function).bind("prompt", "response", {})
    except TypeError as error:
        raise UserError(f"train.rl.rewards: '{path}' is called as function(prompt, response, row): {error}") from None
    except ValueError:  # a function of C says nothing of its arguments
        pass
    return function


@contextmanager
def _importable(folder: str | None) -> Iterator[None]:
    """With a folder as the first place of imports. What is imported from there is forgotten again: another job has
    another folder, and the same folder other contents later."""
    place = Path(folder).expanduser().resolve() if folder is not None else None
    if place is None or not place.is_dir():
        yield
        return
    before = set(sys.modules)
    importlib.invalidate_caches()
    sys.path.insert(0, str(place))
    try:
        yield
    finally:
        sys.path.remove(str(place))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).resolve().is_relative_to(place):
                del sys.modules[name]
