"""The methods of ours: SELECT gives each candidate a number, WEIGHTS each token with loss a weight.

A method is one module in `select/` or `weights/`: its keys in the config, the statistics that it needs, its formula
with its source, its twin in torch where a trainer can make its weights again, and METHOD, which names them. It is
found because it is there; nothing else lists it. A user's own methods: `config/own_methods.py`.
"""

from __future__ import annotations

import importlib
import pkgutil

from grape_service.methods import select, weights
from grape_service.methods.base import SelectMethod, WeightsMethod


def _methods_of(package: object) -> dict[str, object]:
    modules = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")  # type: ignore[attr-defined]
    found = [importlib.import_module(module.name).METHOD for module in modules]
    return {method.name: method for method in sorted(found, key=lambda method: (not method.is_default, method.name))}


SELECT: dict[str, SelectMethod] = _methods_of(select)  # type: ignore[assignment]
"""Select methods by name, the default first."""

WEIGHTS: dict[str, WeightsMethod] = _methods_of(weights)  # type: ignore[assignment]
"""Weights methods by name, the default first."""
