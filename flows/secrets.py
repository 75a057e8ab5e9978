"""Secrets of a config stay out of Prefect's database: parameters of a flow run hold *** in their place.

The values come from the process that started the flow, or from GRAPE_CONFIG_SECRETS in the environment, which a
deployment of `grape deploy` fills from a secret block of Prefect's when a run starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel

from grape_service.config.base import HIDDEN
from grape_service.errors import UserError
from grape_service.release.manifest import secret_places, without_secrets

VARIABLE = "GRAPE_CONFIG_SECRETS"
Secrets = list[tuple[list[Any], str]]
"""Each with the keys, and places in lists, that lead to it: (["notify", "webhook"], "https://...")."""
Settings = TypeVar("Settings", bound=BaseModel)
_kept: list[Secrets] = []


def secrets_of(settings: BaseModel, *above: str) -> Secrets:
    """Values of a config, or of its part below the keys `above`, that are or hold what may be a secret."""
    values = _values(settings)
    return [([*above, *place], _at(values, place)) for place in secret_places(values)]


def hidden(settings: Settings) -> Settings:
    """The config with *** where secrets are."""
    return type(settings).model_validate(without_secrets(_values(settings)))


def restored(settings: Settings, *above: str) -> Settings:
    """The config with its secrets. Raises UserError where one is hidden and its value is nowhere."""
    values = _values(settings)
    if HIDDEN.encode() not in orjson.dumps(values):
        return settings
    for place, value in [*_of_environment(), *(one for secrets in _kept for one in secrets)]:
        if tuple(place[: len(above)]) == above:
            _put(values, place[len(above) :], value)
    left = _hidden_in(values, above)
    if left:
        key = ".".join(map(str, left[0]))
        raise UserError(f"'{key}' is hidden, and {VARIABLE} does not hold it: deploy the config again")
    return type(settings).model_validate(values)


@contextlib.contextmanager
def kept(settings: BaseModel, *above: str) -> Iterator[None]:
    """Inside the block, flows in this process find the secrets of these settings."""
    _kept.append(secrets_of(settings, *above))
    try:
        yield
    finally:
        _kept.pop()


def _values(settings: BaseModel) -> dict[str, Any]:
    values: dict[str, Any] = orjson.loads(settings.model_dump_json(exclude_unset=True))
    return values


def _of_environment() -> Secrets:
    try:
        found = orjson.loads(os.environ.get(VARIABLE) or "[]")
        return [(list(place), str(value)) for place, value in found]
    except (ValueError, TypeError):
        raise UserError(f"{VARIABLE} does not hold the secrets of a config: deploy the config again") from None


def _at(values: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        values = values[key]
    return values


def _put(values: Any, place: list[Any], value: str) -> None:
    with contextlib.suppress(KeyError, IndexError, TypeError):  # of a part that this run does not have
        inner = _at(values, tuple(place[:-1]))
        if _is_hidden(inner[place[-1]]):
            inner[place[-1]] = value


def _is_hidden(value: Any) -> bool:
    return isinstance(value, str) and (value == HIDDEN or f"://{HIDDEN}@" in value or f"?{HIDDEN}" in value)


def _hidden_in(value: Any, above: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, item in items for place in _hidden_in(item, (*above, key))]
    return [above] if _is_hidden(value) else []
