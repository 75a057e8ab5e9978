"""Tags: names that point to a version and move by compare-and-swap, each with the history of its moves."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import orjson

from grape_service.errors import StageError, UserError
from grape_service.json_types import JsonObject
from grape_service.release.claim import BURNED, CLAIM, iso_time
from grape_service.release.manifest import MANIFEST
from grape_service.release.reference import VERSION_PATTERN, check_name, check_tag, version_folder, version_number
from grape_service.storage.storage import Storage, json_bytes

MAX_TRIES = 50
_MAX_TAG_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Move:
    """One move of a tag."""

    id: str
    time: str
    version: str  # to
    previous: str | None  # from
    who: str
    reason: str


@dataclass(frozen=True)
class Tag:
    """A tag and every move it made, in order."""

    name: str
    version: str
    history: list[Move]


def read_tag(storage: Storage, name: str, tag: str) -> Tag | None:
    """A tag, or None if there is none of that name. Raises UserError if its file is broken."""
    return _read(storage, name, tag)[0]


def list_tags(storage: Storage, name: str) -> list[Tag]:
    """Every tag of a dataset, sorted by name."""
    found = [_read(storage, name, tag)[0] for tag in list_tag_names(storage, name)]
    return [tag for tag in found if tag is not None]


def readable_tags(storage: Storage, name: str) -> tuple[list[Tag], list[str]]:
    """Every tag of a dataset that can be read, sorted by name, and a sentence for each that cannot."""
    found: list[Tag] = []
    problems: list[str] = []
    for tag in list_tag_names(storage, name):
        try:
            read = read_tag(storage, name, tag)
        except UserError as error:
            problems.append(str(error))
        else:
            found += [read] if read is not None else []
    return found, problems


def list_tag_names(storage: Storage, name: str) -> list[str]:
    """Names of a dataset's tags, sorted; none of them is read."""
    folder = f"{check_name(name)}/tags"
    names = [info.path.removeprefix(f"{folder}/").removesuffix(".json") for info in storage.list(folder)]
    return sorted(name for name in names if "/" not in name)


def move_tag(
    storage: Storage,
    name: str,
    tag: str,
    version: str,
    who: str = "grape",
    reason: str = "",
    expected: str | None = None,
    only_forward: bool = False,
) -> bool:
    """Point a tag to a version, by compare-and-swap: no move is lost among any number of movers.

    `expected`: refuse if the tag points elsewhere by now. `only_forward`: leave it, and return False, where it
    points to this or a later version. Raises UserError for a bad name, a version that does not exist or an
    expectation that does not hold, StageError if others keep moving it.
    """
    check_tag(tag)
    if not storage.exists(f"{version_folder(name, version)}/{MANIFEST}"):
        raise UserError(f"{storage.root}/{name} has no version {version} that tag '{tag}' could point to")
    move_id = uuid.uuid4().hex
    for attempt in range(MAX_TRIES):
        current, etag = _read(storage, name, tag)
        if current is not None and any(move.id == move_id for move in current.history):
            return True  # an earlier attempt had won, and its answer was lost
        points_to = current.version if current else None
        if expected is not None and points_to != expected:
            mover = f" (by {current.history[-1].who})" if current else ""
            raise UserError(f"tag '{tag}' of {name} points to {points_to or 'nothing'}{mover}, not to {expected}")
        if only_forward and points_to is not None and version_number(points_to) >= version_number(version):
            return False
        move = Move(move_id, iso_time(time.time()), version, points_to, who, reason)
        moved = Tag(tag, version, [*(current.history if current else []), move])
        if storage.compare_and_swap(_path(name, tag), json_bytes(asdict(moved)), etag):
            _check_not_collected(storage, name, moved)
            return True
        time.sleep(random.uniform(0, min(0.02 * 1.5**attempt, 1.0)))
    raise StageError(f"tag '{tag}' of {name} was moved by others {MAX_TRIES} times meanwhile: move it again")


def point_tags(storage: Storage, name: str, tags: Iterable[str], version: str, reason: str) -> dict[str, str]:
    """Move tags to a version, where they are not on it; where those that moved and were there before pointed to.

    Raises UserError, StageError: see `move_tag`.
    """
    moved: dict[str, str] = {}
    for tag in tags:
        current = read_tag(storage, name, tag)
        if current is None or current.version != version:
            move_tag(storage, name, tag, version, reason=reason)
            moved |= {tag: current.version} if current is not None else {}
    return moved


def _check_not_collected(storage: Storage, name: str, moved: Tag) -> None:
    """Take a move back if gc took the version at the same time (it marks the claim before it looks at the tags)."""
    try:
        claim = storage.read_json(f"{version_folder(name, moved.version)}/{CLAIM}")
    except FileNotFoundError:
        return  # published without this program
    if claim.get("state") != BURNED:
        return
    back = moved.history[-1].previous
    current, etag = _read(storage, name, moved.name)
    if current == moved:
        if back is None:
            storage.delete(_path(name, moved.name))
        else:
            move = Move(
                uuid.uuid4().hex, iso_time(time.time()), back, moved.version, "grape", "version collected by gc"
            )
            reverted = Tag(moved.name, back, [*moved.history, move])
            storage.compare_and_swap(_path(name, moved.name), json_bytes(asdict(reverted)), etag)
    raise UserError(f"{storage.root}/{name}@{moved.version} was deleted by gc meanwhile: choose another version")


def _path(name: str, tag: str) -> str:
    return f"{check_name(name)}/tags/{tag}.json"


def _read(storage: Storage, name: str, tag: str) -> tuple[Tag | None, str | None]:
    path = _path(name, check_tag(tag))
    try:
        data, etag = storage.read_with_etag(path)
    except FileNotFoundError:
        return None, None
    try:
        if len(data) > _MAX_TAG_BYTES:
            raise ValueError
        return _parse(tag, orjson.loads(data)), etag
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{storage.url(path)} is not a tag: restore or delete it") from error


def _parse(tag: str, value: JsonObject) -> Tag:
    if not VERSION_PATTERN.fullmatch(value["version"]):
        raise ValueError
    return Tag(tag, value["version"], [Move(**move) for move in value["history"]])
