"""What the models of the config say of themselves: the JSON schema for editors, and the page docs/config.md."""

from __future__ import annotations

from typing import Any

import orjson

from grape_service.config.schema import Config
from grape_service.json_types import JsonObject

_HEAD = """# Config

One YAML file describes a job, on a laptop and on a cluster. An unknown key is refused, and the nearest known one named.
`grape init POOL --model M` writes a config that fits a pool; `--set key=value` overrides a key on the command line
(`--set select.keep=2`, `--set pool.where.0.at_least=3`). In an editor that knows the YAML language server, the first
line of a config completes and checks its keys:

```yaml
# yaml-language-server: $schema=grape.schema.json
```

where `grape schema > grape.schema.json` writes that file. `${NAME}` in a value is what the environment has under that
name; where it is not set it stays as it is, and a path refuses it (programs and patterns, as in `command`, keep it).
Keys of the top level that begin with `x-` are for anchors: `x-model: &m {dtype: bfloat16}`, then
`target: {<<: *m, model: ...}`. Secrets never stand in a config: credentials of S3 come from
`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY` or a profile.

This page is made from the models by `make docs`; a test holds it fresh.
"""


def config_schema() -> JsonObject:
    """The JSON schema of a config."""
    schema = Config.model_json_schema()
    schema["patternProperties"] = {"^x-": {}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "grape-service config"}


def config_page() -> str:
    """docs/config.md: every section with its keys, their types, defaults and what they mean."""
    schema = config_schema()
    page = _Page(schema.get("$defs", {}))
    page.section("", schema)
    return f"{_HEAD}\n{page.text()}"


class _Page:
    """Sections in the order in which the config has them; a model that comes again is referred to."""

    def __init__(self, models: JsonObject):
        self.models = models
        self.sections: list[str] = []
        self.first: dict[str, str] = {}  # where each model is described

    def text(self) -> str:
        return "\n".join(self.sections)

    def section(self, path: str, model: JsonObject) -> None:
        """A table of the model's keys, then the sections below it."""
        required = set(model.get("required", []))
        title = f"## `{path}`" if path else "## Top level"
        lines = [title, "", *([_line(model["description"]), ""] if path and model.get("description") else [])]
        lines += ["| key | value | default | |", "|---|---|---|---|"]
        below: list[str] = []
        for key, value in model["properties"].items():
            place = f"{path}.{key}" if path else key
            new = [name for name in _models_in(value) if name not in self.first]
            self.first |= {name: place if name == new[0] else f"{place} ({name})" for name in new}
            below += new
            default = "**needed**" if key in required else _default(value)
            lines.append(f"| `{key}` | {self.kind(value, place)} | {default} | {_cell(value.get('description', ''))} |")
        self.sections.append("\n".join([*lines, ""]))
        for name in below:
            self.section(self.first[name], _object_of(self.models[name]))

    def kind(self, value: JsonObject, place: str) -> str:
        """A value's type in words."""
        if "$ref" in value:
            return self.link(value["$ref"].rpartition("/")[2], place)
        if "oneOf" in value:
            value = {"anyOf": value["oneOf"]}
        if "anyOf" in value:
            kinds = [self.kind(part, place) for part in value["anyOf"] if part.get("type") != "null"]
            kinds = [kind for kind in kinds if kind != _WORDS["integer"] or _WORDS["number"] not in kinds]
            return " or ".join(kinds) + (
                " or null" if any(part.get("type") == "null" for part in value["anyOf"]) else ""
            )
        if "enum" in value or "const" in value:
            return " \\| ".join(f"`{_yaml(item)}`" for item in value.get("enum", [value.get("const")]))
        if value.get("type") == "array":
            if "prefixItems" in value:
                return f"{len(value['prefixItems'])} {self.kind(value['prefixItems'][0], place)}s"
            return f"list of {self.kind(value['items'], place)}s" if value.get("items") else "list"
        if value.get("type") == "object":
            inner = value.get("additionalProperties")
            return f"names with {self.kind(inner, place)}" if isinstance(inner, dict) and inner else "any keys"
        return _WORDS.get(value.get("type", ""), "any value")

    def link(self, name: str, place: str) -> str:
        where = self.first[name]
        anchor = where.replace(".", "").replace(" ", "-").replace("(", "").replace(")", "").lower()
        return f"[section](#{anchor})" if where.startswith(place) else f"[section like `{where}`](#{anchor})"


_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true \\| false"}


def _models_in(value: JsonObject) -> list[str]:
    found = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
    parts = [*value.get("anyOf", []), *value.get("oneOf", []), value.get("items"), value.get("additionalProperties")]
    for part in parts:
        found += _models_in(part) if isinstance(part, dict) else []
    return list(dict.fromkeys(found))


def _object_of(model: JsonObject) -> JsonObject:
    """The form with keys of a model that may also be written as one word."""
    return model if "properties" in model else next(part for part in model["anyOf"] if "properties" in part)


def _default(value: JsonObject) -> str:
    if "default" not in value or ("$ref" in value and isinstance(value["default"], dict)):
        return ""
    return f"`{_cell(_yaml(value['default']))}`"


def _yaml(value: Any) -> str:
    if isinstance(value, str) and value and value.strip() == value:
        return value
    return orjson.dumps(value).decode().replace(",", ", ")


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|").replace("<", "\\<")


def _line(text: str) -> str:
    return " ".join(text.split())
