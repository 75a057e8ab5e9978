"""Where an export goes, what it says of itself, and how it comes to be whole or not there.

An export is written below `unfinished/` and moved to its place at the end, README.md last: whatever ends the process
before, no trainer finds a part of it. The next export to the same folder starts over.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grape_service.errors import UserError
from grape_service.release.load import Release
from grape_service.storage.storage import Storage

LOADERS = Path(__file__).with_name("loaders")
"""Python files that are copied into an export: they run in a trainer's environment, without this package."""
UNFINISHED = "unfinished"
STATE = "export.json"
README = "README.md"


@dataclass(frozen=True)
class Target:
    """Where an export is written."""

    storage: Storage  # of the unfinished export
    folder: str  # where it will be
    drop_weights: bool
    eval_share: float  # share of the prompts that goes to a file of its own, by their digest
    whole_turns: bool = False  # whether rows with a prefill are left out

    @property
    def splits(self) -> list[str]:
        """train, and eval where a share of the prompts is asked for."""
        return ["train", "eval"] if self.eval_share else ["train"]

    def add_loader(self, name: str) -> None:
        """Put one of LOADERS beside the data."""
        self.storage.write(name, (LOADERS / name).read_bytes())

    def summary(
        self,
        to: str,
        release: Release,
        rows: dict[str, int],
        sentence: str,
        usage: str,
        kept: list[str],
        lost: list[str],
        notes: list[str] | None = None,
    ) -> ExportSummary:
        """What was written, said in a README.md beside the data too: `rows` by split, `usage` for the trainer."""
        if self.eval_share:
            notes = [*(notes or []), f"{rows['eval']} rows of other prompts are kept back for evaluation."]
        summary = ExportSummary(
            to, self.folder, rows["train"], sentence, rows.get("eval", 0), list(kept), list(lost), notes or []
        )
        parts = [f"# {release.name} {release.version} for {to}", f"From `{release.reference}`.", *summary.lines, usage]
        self.storage.write(README, ("\n\n".join(parts) + "\n").encode())
        return summary


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    to: str
    folder: str
    rows: int  # lines or rows for training
    sentence: str  # one line for the user: what became of the weights
    eval_rows: int = 0
    kept: list[str] = field(default_factory=list)  # columns of the release, and fields of its messages
    left_behind: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # further lines for the user

    @property
    def lines(self) -> list[str]:
        """What a person is told."""
        lost = ", ".join(self.left_behind)
        return [self.sentence, *self.notes, *([f"Not in it: {lost}."] if lost else [])]


def begin(storage: Storage, release: Release, to: str) -> tuple[Storage, str, str | None]:
    """(Storage of an unfinished export below `storage`, its id, a line on an earlier one that did not end).

    Raises UserError if the folder holds anything else.
    """
    place = storage.sub(UNFINISHED)
    earlier: dict[str, Any] | None = place.read_json(STATE) if place.exists(STATE) else None
    if earlier is not None:
        for name in earlier.get("moved", []):
            storage.delete(name)
    foreign = [info.path for info in storage.list() if not info.path.startswith(f"{UNFINISHED}/")]
    if foreign:
        raise UserError(f"{storage.root} is not empty: give a new folder as DIR")
    if earlier is not None:
        place.delete_folder("")
        place.delete_unfinished(place.unfinished(older_than=0))
    token = uuid.uuid4().hex
    place.write_json(STATE, {"id": token, "release": release.reference, "to": to, "moved": []})
    said = f"an earlier export of {earlier['release']} to this folder did not end: starting over" if earlier else None
    return place, token, said


def move(storage: Storage, place: Storage, token: str) -> None:
    """Move an unfinished export to its place. Raises UserError where another began in the meantime."""
    state = place.read_json(STATE)
    if state["id"] != token:
        raise UserError(f"another export to {storage.root} began while this one was written: give each its own folder")
    names = [info.path for info in place.list() if info.path != STATE]
    names.sort(key=lambda name: ("/" not in name, name == README, name))
    place.write_json(STATE, {**state, "moved": names})
    if storage.is_s3:
        for name in names:
            storage.fs.copy(place.full(name), storage.full(name))
    else:
        for top in dict.fromkeys(name.split("/")[0] for name in names):
            os.replace(place.full(top), storage.full(top))
    place.delete_folder("")
