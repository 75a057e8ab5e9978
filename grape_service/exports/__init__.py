"""Releases in the forms that trainers take.

    summary = export(release, "verl", "exported/")
    print(summary.sentence)

Loss weights are never dropped silently: a trainer that cannot take token weights gets them in the form that it
can, and the summary's sentence says which. `drop_weights=True` is how to mean it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from grape_service.errors import UserError
from grape_service.exports import jsonl, llamafactory, trl, verl
from grape_service.exports.summary import ExportSummary, Target
from grape_service.release.load import Release
from grape_service.storage.storage import Storage

Trainer = Literal["trl", "verl", "llamafactory", "jsonl"]

_EXPORTS: dict[str, Callable[[Release, Target], ExportSummary]] = {
    "trl": trl.export,
    "verl": verl.export,
    "llamafactory": llamafactory.export,
    "jsonl": jsonl.export,
}


def export(release: Release, to: str, folder: str, drop_weights: bool = False) -> ExportSummary:
    """Write a release for the trainer `to` (trl, verl, llamafactory, jsonl) into a new or empty folder.

    Streams: memory does not grow with the release. Raises UserError for an unknown trainer or a folder in use.
    """
    if to not in _EXPORTS:
        raise UserError(f"'{to}' is no export; there are {', '.join(get_args(Trainer))}")
    storage = Storage(folder, release.storage.options)
    if storage.list():
        raise UserError(f"{storage.root} is not empty: give a new folder to export to")
    return _EXPORTS[to](release, Target(storage, drop_weights))


__all__ = ["ExportSummary", "export"]
