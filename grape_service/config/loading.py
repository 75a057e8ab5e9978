"""Reads a config file and says in one sentence what is wrong with it."""

from __future__ import annotations

import copy
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from grape_service.config.limits import MAX_BYTES, MAX_DEPTH, check_size
from grape_service.config.policy import BehaviorConfig, PolicyConfig
from grape_service.config.schema import Config
from grape_service.config.variables import filled, without_anchors
from grape_service.display import nearest
from grape_service.errors import UserError, without_url_secrets
from grape_service.json_types import JsonObject

SECRET_SECTIONS = ("notify", "storage")
"""Of their values no sentence repeats one."""


def read_config(config: JsonObject | str | Path | Config, overrides: Sequence[str] = ()) -> Config:
    """A config from a dict, the path of a YAML file or a Config, with `overrides` put over it. Raises UserError."""
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if isinstance(config, Config):
        if not overrides:
            return config
        config = config.model_dump(mode="json", exclude_unset=True)
    if not isinstance(config, dict):
        raise UserError(f"a config is a dict, the path of a YAML file or a Config, not a {type(config).__name__}")
    values = copy.deepcopy(config)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `overrides` such as 'select.keep=2' put over it.

    Raises UserError that names the file and the key."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"there is no config file '{path}'") from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder: give a config file (.yaml), such as `grape init` writes") from None
    except OSError as error:
        raise UserError(f"the config file '{path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is no text: give a config file (.yaml), such as `grape init` writes") from None
    if str(path).endswith((".jsonl", ".ndjson", ".csv")):
        raise UserError(f"'{path}' is a pool: `grape init {path} --model M > config.yaml` writes a config for it")
    if len(text) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES // 2**20} MiB: give a config file")
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        if isinstance(error, yaml.constructor.ConstructorError):
            raise UserError(f"{path}{place}: {error.problem}") from None
        raise UserError(f"{path}{place} is not YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise UserError(f"{path} is nested deeper than {MAX_DEPTH} levels, which no config is") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no config: it should start with 'name:'")
    check_size(values, str(path))
    values = filled(without_anchors(values))
    for override in overrides:
        apply_override(values, override)
    keys = [override.partition("=")[0].strip() for override in overrides]  # a value may be a secret
    where = f"{path} with --set {' --set '.join(keys)}" if keys else str(path)
    return parse_config(values, where)


_KEY = re.compile(r"[\w.-]*")


def apply_override(values: JsonObject, override: str) -> None:
    """Put 'key=value' into the values of a config: dots lead into sections, numbers into lists, the value is YAML.

    Raises UserError for what is no such pair, or leads nowhere."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {_KEY.match(override)[0]} is not key=value: write --set select.keep=2")  # type: ignore[index]
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--set {key}: this is not a YAML value: {getattr(error, 'problem', '')}") from None
    place: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                section = ".".join(parts[:depth])
                raise UserError(f"--set {key}: '{section}' is a list of {len(place)}: count its items from 0")
            step: Any = int(part)
        elif isinstance(place, dict):
            step = part
        else:
            section = ".".join(parts[:depth])
            raise UserError(
                f"--set {key}: '{section}' is the value {shortened(place)} and has no keys: set '{section}' itself"
            )
        if last:
            place[step] = value
        elif isinstance(place, dict) and place.get(step) is None:
            place[step] = {}
        place = place[step]


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is there twice is a mistake: PyYAML would take the last one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is there twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def parse_config(values: JsonObject, where: str = "the config") -> Config:
    """Values -> Config. Raises UserError for the first thing that is wrong."""
    check_size(values, where)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from None


def explain(error: ValidationError, model: type[BaseModel] = Config) -> str:
    """One sentence for a pydantic error; an unknown key is answered with the nearest known one."""
    details = error.errors()
    first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    location = [part for part in first["loc"] if not _is_union_branch(part)]
    if location[:2] == ["behavior", "policy"]:  # its keys stand directly below behavior
        location.remove("policy")
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], model)
        return f"unknown key '{key}'; {nearest(str(location[-1]), list(known), 'known keys here')}"
    if first["type"] == "missing":
        return f"the key '{key}' is missing"
    message = in_our_words(first)
    if not key:
        return message
    is_silent = first["type"] == "value_error" or location[0] in SECRET_SECTIONS
    given = "" if is_silent else f" (it is {shortened(first['input'])})"
    return f"'{key}': {message[0].lower() + message[1:]}{given}"


def in_our_words(error: Any) -> str:
    """What a pydantic error says, without the names of its types and of our classes."""
    kind, context = error["type"], error.get("ctx") or {}
    if kind in ("model_type", "dict_type", "model_attributes_type", "dataclass_type"):
        return "should be a section with keys of its own"
    if kind == "list_type":
        return "should be a list, such as [a, b]"
    if kind == "tuple_type":
        return "should be a list of two, [lower, upper]"
    if kind in ("int_type", "int_parsing", "int_from_float"):
        return "should be a whole number"
    if kind in ("float_type", "float_parsing"):
        return "should be a number"
    if kind in ("bool_type", "bool_parsing"):
        return "should be true or false"
    if kind == "string_type":
        return "should be a text"
    if kind == "literal_error":
        return f"should be {context['expected']}"
    bounds = {
        "greater_than": ("gt", "above"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "below"),
        "less_than_equal": ("le", "at most"),
    }
    if kind in bounds:
        name, words = bounds[kind]
        return f"should be {words} {context[name]:g}"
    if kind == "finite_number":
        return "should be a finite number"
    if kind in ("too_short", "string_too_short"):
        return "should not be empty"
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")


def shortened(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    text = without_url_secrets(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_union_branch(part: Any) -> bool:
    text = str(part)
    return text.startswith(("literal[", "function-", "list[", "constrained-")) or text in (
        "PolicyConfig",
        "RecordedBehavior",
        "KeepColumn",
        "int",
        "str",
    )


def _known_keys(location: list[Any], model: type[BaseModel]) -> list[str]:
    models = [model]
    for part in location:
        found: list[type[BaseModel]] = []
        for candidate in models:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                found.extend(_models_in(field.annotation))
        models = found or models
    if BehaviorConfig in models:
        models = [*models, PolicyConfig]
    return sorted({key for candidate in models for key in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_origin(annotation):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
