"""Checkpoints that are whole or not there: a marker file, written last, lists every file and its size.

Trainers work in a local folder. Where the output is on S3, each whole checkpoint is copied there, marker last.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from grape_service.errors import StageError, UserError
from grape_service.models.whole import MARKER, CheckpointFacts, CheckpointFile, check_whole
from grape_service.storage.storage import Storage, json_bytes
from workers.training.trainers.card import CARD, card

PROGRESS_FILE = "progress.json"
"""Where a job of our own trainers is: step, steps, loss, ess, reward, seconds_left, time."""
ERROR_FILE = "error.json"
"""What a job of our own trainers said that the user can correct: error, time."""
DIGEST_LIMIT = 64 * 2**20
"""Files up to this size are listed with their sha256; of larger ones the size is checked."""


def mark_whole(folder: Path, facts: CheckpointFacts) -> None:
    """Write the card and, last, the marker of a checkpoint folder: its files and `facts` (what it was made from).

    Files get the folder's permissions: weights are written for their owner alone, whoever else may read the folder.
    """
    (folder / CARD).write_text(card(facts), encoding="utf-8")
    files: dict[str, CheckpointFile] = {}
    mode = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER:
            path.chmod(mode)
            size = path.stat().st_size
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= DIGEST_LIMIT else None
            files[path.relative_to(folder).as_posix()] = {"size": size, "sha256": digest}
    Storage(str(folder)).write(MARKER, json_bytes({**facts, "files": files}))


def is_whole(storage: Storage) -> bool:
    """Whether our marker is there and every file that it lists is too."""
    try:
        return storage.exists(MARKER) and check_whole(storage) is not None
    except StageError:
        return False


def step_folders(storage: Storage) -> list[str]:
    """Names of the checkpoints checkpoint-<step> of a trainer's folder, newest first."""
    names = [name for name in storage.folders() if name.removeprefix("checkpoint-").isdigit()]
    return sorted(names, key=lambda name: -int(name.removeprefix("checkpoint-")))


def last_whole(storage: Storage, inputs: str | None = None) -> str | None:
    """Name of the newest whole checkpoint of a trainer's folder; with `inputs`, of those made of these."""
    return next((name for name in step_folders(storage) if _is_whole_of(storage.sub(name), inputs)), None)


def _is_whole_of(storage: Storage, inputs: str | None) -> bool:
    return is_whole(storage) and (inputs is None or storage.read_json(MARKER).get("inputs") == inputs)


def upload(folder: Path, storage: Storage) -> None:
    """Copy a local checkpoint folder, its marker last."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
    storage.delete(MARKER)
    for path in paths:
        with path.open("rb") as source, storage.open_write(path.relative_to(folder).as_posix()) as sink:
            shutil.copyfileobj(source, sink, 16 * 2**20)
    storage.write(MARKER, (folder / MARKER).read_bytes())


def download(storage: Storage, folder: Path) -> Path:
    """Copy a folder to local disk."""
    files = storage.list()
    if not files:
        raise UserError(f"there is nothing in {storage.root}: give the folder of a model")
    for info in files:
        target = folder / info.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.open(info.path) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 16 * 2**20)
    return folder
