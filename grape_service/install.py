"""What to type to install what is missing."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

TRAIN_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft")
"""What our own trainers import."""


def install_command(extra: str) -> str:
    """The command that adds an extra to this installation: a checkout keeps its editable install and its versions."""
    home = Path(__file__).resolve().parents[1]
    constraints = home / "requirements" / "constraints.txt"
    python = shlex.quote(sys.executable)
    if not (home / "pyproject.toml").is_file() or not constraints.is_file():
        return f"{python} -m pip install 'grape-service[{extra}]'"
    extras = extra if extra == "run" else f"run,{extra}"
    place = shlex.quote(f"{home}[{extras}]")
    return f"{python} -m pip install -c {shlex.quote(str(constraints))} -e {place}"
