"""The two ways in which a run can end badly. Everything else is a bug and shows a traceback."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

log = logging.getLogger(__name__)

_USER = re.compile(r"(?<=://)(?:[^/\s@'\"]+|[^/\s@'\":]+:(?!\d{1,5}(?:/|$))[^\s@'\"]*)@")
_QUERY = re.compile(r"(://[^\s'\"?]*\?)[^\s'\"]*=[^\s'\"]*")


def without_url_secrets(text: str) -> str:
    """A text in which no URL has a user, a password or the values of a query."""
    return _QUERY.sub(r"\1***", _USER.sub("***@", text)) if "://" in text else text


class UserError(ValueError):
    """A user error: something that the user can correct. Its text is one plain sentence that names the file, row or
    key and says what would be right. The CLI prints it and exits with status 2. URLs in it lose their secrets."""

    def __init__(self, text: object = ""):
        super().__init__(without_url_secrets(str(text)))

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the sentence."""
        return [f"{type(self).__name__}: {self}"]


class StageError(RuntimeError):
    """A stage failed although its input was fine. The CLI prints it and exits with status 1. URLs in it lose their
    secrets."""

    def __init__(self, text: object = ""):
        super().__init__(without_url_secrets(str(text)))

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the sentence."""
        return [f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Give up `what` where it fails, with a log line that says so: for work without which a run can continue.

    The line names the type of the error alone, since its text may hold an address or a secret.
    """
    try:
        yield
    except Exception as error:
        log.warning("gave up to %s: %s", what, type(error).__name__)
