"""Variables of the environment in a config file, and keys that only hold anchors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

NAME = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
AS_THEY_STAND = frozenset({"command", "chat_template", "pattern", "step_end"})
"""Keys whose values are programs or patterns, in which ${...} is theirs."""
ANCHORS = "x-"


def without_anchors(values: dict[Any, Any]) -> dict[Any, Any]:
    """A config without the keys of its top level that begin with x-: they hold what aliases refer to."""
    return {key: value for key, value in values.items() if not str(key).startswith(ANCHORS)}


def filled(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Values of a config with ${NAME} replaced where the environment has it; one that is not set stays as it is, and a
    path that holds it is refused by name. Values of AS_THEY_STAND are not looked at."""
    if isinstance(value, str):
        return NAME.sub(lambda match: environment.get(match[1], match[0]), value)
    if isinstance(value, list):
        return [filled(item, environment) for item in value]
    if isinstance(value, dict):
        return {k: item if k in AS_THEY_STAND else filled(item, environment) for k, item in value.items()}
    return value
