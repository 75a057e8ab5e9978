"""Releases in the forms that trainers take.

    summary = export(release, "verl", "exported/")
    print(summary.sentence)

Loss weights are never dropped silently: a trainer that cannot take token weights gets them in the form that it
can, and the summary's sentence says which and what becomes of the gradient. `drop_weights=True` is how to mean it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, get_args

from grape_service.errors import UserError
from grape_service.exports import (
    axolotl,
    jsonl,
    llamafactory,
    llamafactory_v1,
    megatron,
    openrlhf,
    swift,
    tinker,
    trl,
    verl,
)
from grape_service.exports.summary import ExportSummary, Target, begin, move
from grape_service.release.load import Release
from grape_service.storage.storage import Storage

Trainer = Literal[
    "trl",
    "verl",
    "ms-swift",
    "llamafactory",
    "llamafactory-v1",
    "megatron-bridge",
    "tinker",
    "axolotl",
    "openrlhf",
    "jsonl",
]

_EXPORTS: dict[str, Callable[[Release, Target], ExportSummary]] = {
    "trl": trl.export,
    "verl": verl.export,
    "ms-swift": swift.export,
    "llamafactory": llamafactory.export,
    "llamafactory-v1": llamafactory_v1.export,
    "megatron-bridge": megatron.export,
    "tinker": tinker.export,
    "axolotl": axolotl.export,
    "openrlhf": openrlhf.export,
    "jsonl": jsonl.export,
}


def export(
    release: Release,
    to: str,
    folder: str | os.PathLike[str],
    drop_weights: bool = False,
    eval_share: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
) -> ExportSummary:
    """Write a release for the trainer `to` (one of `Trainer`) into a new or empty folder.

    `eval_share`: this share of the prompts goes to a file of its own, the same prompts that `train.sft.eval_share`
    keeps back. Streams: memory does not grow with the release. The files appear when all are written; a folder with
    an export that did not end is started over, and `say` is told. Raises UserError for an unknown trainer or a
    folder in use.
    """
    if to not in _EXPORTS:
        raise UserError(f"--to {to} is no export: choose one of {', '.join(get_args(Trainer))} or hub")
    if not 0 <= eval_share < 1:
        raise UserError(f"--eval-share {eval_share:g} is no share: give a number from 0 to below 1, such as 0.05")
    storage = Storage(os.fspath(folder), release.storage.options)
    place, token, earlier = begin(storage, release, to)
    if earlier:
        say(earlier)
    summary = _EXPORTS[to](release, Target(place, storage.root, drop_weights, eval_share))
    move(storage, place, token)
    return summary


__all__ = ["ExportSummary", "Trainer", "export"]
