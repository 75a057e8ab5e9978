"""`grape_service.run`: what `grape run` does, from Python."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

_one_at_a_time = threading.RLock()

if TYPE_CHECKING:
    from grape_service.config.schema import Config
    from grape_service.release.load import Release


def run_config(config: dict[str, Any] | str | Path | Config, force: bool, overrides: Sequence[str]) -> Release:
    """Run the pipeline of a config with progress shown, and open the version that it made.

    Runs in several threads of a process take turns: Ray is one for the whole process.
    """
    from grape_service.cli.packages import missing_package, refuse_hidden_packages
    from grape_service.config.loading import read_config
    from grape_service.progress.bars import shown
    from grape_service.release.load import load

    settings = read_config(config, overrides)
    refuse_hidden_packages()
    try:
        from workers.pipeline import run_pipeline
    except ModuleNotFoundError as error:
        raise missing_package(error) or error from None

    with _one_at_a_time, shown():
        outcome = run_pipeline(settings, force=force)
    assert outcome.reference is not None
    return load(outcome.reference, settings.storage)
