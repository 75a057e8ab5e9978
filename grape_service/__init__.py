"""Decides what a language model learns from: GRAPE selection, PEAR weights, versioned releases."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from grape_service.version import __version__

if TYPE_CHECKING:
    from grape_service.config.schema import Config
    from grape_service.release.load import Release

Function = TypeVar("Function", bound=Callable[..., Any])


def uses(
    statistics: Sequence[str] = ("logprob",),
    columns: Sequence[str] = (),
    better: Literal["largest", "smallest"] = "largest",
) -> Callable[[Function], Function]:
    """What a select or weights method of your own needs, said above its function.

    `statistics` are of logprob, entropy, rank, top20_entropy; `columns` are the pool's; `better` is for select alone.
    The function takes a `grape_service.rows.method_batch.MethodBatch` and gives one number a candidate, or one weight a
    token.
    """

    def declare(function: Function) -> Function:
        for name, value in (("statistics", tuple(statistics)), ("columns", tuple(columns)), ("better", better)):
            setattr(function, name, value)
        return function

    return declare


def load(
    reference: str | os.PathLike[str], storage: dict[str, Any] | None = None, check_files: bool = False
) -> Release:
    """Open a dataset version, e.g. ``load("s3://team/datasets/math-sft@latest")``.

    `storage` holds s3fs options; secrets come from the environment. `check_files` reads every data file once and
    compares its digest with the manifest's. Raises UserError if there is no such version, or a file differs.
    """
    from grape_service.release.load import load as load_release

    return load_release(reference, storage, check_files)


def run(config: dict[str, Any] | str | Path | Config, force: bool = False, overrides: Sequence[str] = ()) -> Release:
    """Do the whole job of a config, as `grape run` does, and open the version that it made.

    `config` is a dict, the path of a YAML file, or a Config; `overrides` are those of `--set`, such as
    "select.keep=2". The same config gives the same version again unless `force`. Progress is shown in a terminal and
    in Jupyter. Raises UserError with one plain sentence for a user error, StageError for a stage that failed.
    """
    from grape_service.cli.from_python import run_config

    return run_config(config, force, overrides)


__all__ = ["__version__", "load", "run", "uses"]
