"""What to do after a run, as commands that work when they are pasted into the shell that the user sees."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from grape_service.errors import without_url_secrets
from grape_service.install import TRAIN_PACKAGES, install_command


def next_steps(
    reference: str, prompt_id: str | None, config: str, sets: Sequence[str] = (), has_train: bool = False
) -> list[tuple[str, str]]:
    """(what for, command) each: the pages of the folder, a prompt, an export, training, and Python.

    `config` and `sets` are those of the run; `has_train` says that the config trains by itself."""
    grape, quoted = grape_command(), shlex.quote(reference)
    folder, _, named = reference.rpartition("/")
    export_to = shlex.quote(f"{named.replace('@', '-')}-trl")
    steps = [("look", f"{grape} ui {shlex.quote(folder)}")]
    if prompt_id is not None and not prompt_id.startswith("-"):
        steps.append(("explain", f"{grape} explain {quoted} {shlex.quote(prompt_id)}"))
    steps.append(("export", f"{grape} export {quoted} --to trl {export_to}"))
    if not has_train and not any(without_url_secrets(one) != one for one in sets):
        words = [one for value in [*sets, "train.sft.epochs=1"] for one in ("--set", shlex.quote(value))]
        train = f"{grape} train {quoted} --config {shlex.quote(config)} {' '.join(words)}"
        missing = any(importlib.util.find_spec(package) is None for package in TRAIN_PACKAGES)
        steps.append(("train", f"{install_command('train')} && {train}" if missing else train))
    code = f"import grape_service; print(grape_service.load({reference!r}).to_hf())"
    quoted_code = shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'
    steps.append(("load it", f"{python_command()} -c {quoted_code}"))
    return steps


def python_command() -> str:
    """What starts this Python in the shell that the user sees."""
    return _command("python", sys.executable, sys.executable)


def grape_command() -> str:
    """What starts `grape` of this installation there."""
    beside = Path(sys.executable).with_name("grape")
    if beside.is_file():
        return _command("grape", str(beside), str(beside))
    return f"{python_command()} -m grape_service.cli"


def _command(name: str, program: str, shown: str) -> str:
    """The name alone where the shell finds this program by it; else a path to it."""
    if os.environ.get("GRAPE_IN_CLUSTER"):  # a program of another machine than the one that shows this
        return name
    found = shutil.which(name)
    if found and os.path.abspath(found) == os.path.abspath(program):
        return name
    near = os.path.relpath(shown)
    return shlex.quote(shown if near.startswith("..") else near)
