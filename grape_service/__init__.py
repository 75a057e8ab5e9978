"""Decides what a language model learns from: GRAPE selection, PEAR weights, versioned releases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grape_service.release.load import Release

__version__ = "0.1.0"


def load(reference: str, storage: dict[str, Any] | None = None, check_files: bool = False) -> Release:
    """Open a dataset version, e.g. ``load("s3://team/datasets/math-sft@latest")``.

    `storage` holds s3fs options; secrets come from the environment. `check_files` reads every data file once and
    compares its digest with the manifest's. Raises UserError if there is no such version, or a file differs.
    """
    from grape_service.release.load import load as load_release

    return load_release(reference, storage, check_files)
