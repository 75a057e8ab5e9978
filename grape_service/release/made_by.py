"""What tells versions of a dataset apart: how their rows were chosen, for whom, from which pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grape_service.json_types import JsonObject

SETTINGS = ("method", "keep", "target", "pool")


@dataclass(frozen=True)
class MadeBy:
    """The settings of a version that people ask for first, as text; empty where it has none."""

    method: str = ""  # select and weights: "grape + pear"
    keep: str = ""  # rows of a prompt
    target: str = ""  # its model
    pool: str = ""  # its path

    @staticmethod
    def of(config: JsonObject) -> MadeBy:
        """Those of the config in a manifest, which other programs may have written."""
        select, weights, target, pool = (_section(config, key) for key in ("select", "weights", "target", "pool"))
        method = " + ".join(str(part["method"]) for part in (select, weights) if part.get("method"))
        return MadeBy(method, _keep(select.get("keep")), str(target.get("model") or ""), _path(pool.get("path")))

    def since(self, before: MadeBy) -> list[str]:
        """What is another than in the version before: 'keep 1 -> 2'."""
        pairs = ((name, getattr(before, name), getattr(self, name)) for name in SETTINGS)
        return [f"{name} {old or 'none'} -> {new or 'none'}" for name, old, new in pairs if old != new]


def _section(config: JsonObject, key: str) -> JsonObject:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _keep(keep: Any) -> str:
    if isinstance(keep, dict):
        return f"column {keep['column']}" if keep.get("column") else ""
    return "" if keep is None else str(keep)


def _path(path: Any) -> str:
    if isinstance(path, list):
        paths = [str(one.get("path") if isinstance(one, dict) else one) for one in path]
        return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else "".join(paths)
    return str(path or "")
