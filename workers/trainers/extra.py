"""The optional dependencies of the trainers."""

from __future__ import annotations

import importlib.util

from grape_service.errors import UserError

TRAIN_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")


def require_train_extra(*more: str) -> None:
    """Raises UserError that names what to install when a package of the train extra is missing."""
    for package in (*TRAIN_PACKAGES, *more):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"training needs the package '{package}': run pip install '.[train]'")
