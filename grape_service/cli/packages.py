"""Packages that a command needs and that are not there, or are not ours."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import grape_service.version
from grape_service.errors import UserError
from grape_service.install import install_command

EXTRAS = {
    "run": (
        "ray",
        "torch",
        "transformers",
        "tokenizers",
        "huggingface_hub",
        "psutil",
        "httpx",
        "zstandard",
        "requests",
    ),
    "prefect": ("prefect", "sqlalchemy"),
    "ui": ("fastapi", "starlette", "uvicorn", "markdown_it"),
    "train": ("trl", "accelerate", "peft", "math_verify"),
    "vllm": ("vllm",),
}
"""Packages that each extra brings, and that a plain install, which reads releases, has not."""

OURS = ("workers", "flows")


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """The sentence for a package that an extra brings; None for another one."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return UserError(f"this needs the package '{package}', which is not installed: {install_command(extra)}")
    return None


def need_run() -> None:
    """Raises UserError where what runs models is not installed, before a process beside this one finds out."""
    for package in ("transformers", "torch", "psutil"):
        if importlib.util.find_spec(package) is None:
            raise missing_package(ModuleNotFoundError(name=package)) or AssertionError


def refuse_hidden_packages() -> None:
    """Raises UserError where a package of the user's stands before one of ours of the same name: in this process, or
    in those of a run, which look into the current folder first. A folder without `__init__.py` hides nothing."""
    home = Path(grape_service.version.__file__).resolve().parents[1]
    for name in OURS:
        spec = importlib.util.find_spec(name)
        places = [Path(spec.origin)] if spec is not None and spec.origin else []
        places += [place for place in (Path(name, "__init__.py"), Path(f"{name}.py")) if place.is_file()]
        for place in places:
            if place.resolve() not in (home / name / "__init__.py", home / f"{name}.py"):
                found = os.path.relpath(place.parent if place.name == "__init__.py" else place)
                raise UserError(
                    f"'{found}' hides the package '{name}' of grape-service: rename it, or start in another folder"
                )
