"""What a file holds, as a digest that is remembered while the file stays as it is.

A file is the same where its size and its two times are (written, and changed in any way, which nobody can set). One
that is young is read again each time: it may be written once more within one tick of the clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grape_service.keys import digest_of
from grape_service.storage.temporary import temporary_folder

SETTLED_NS = 2 * 10**9
"""A file that was written or changed later than so long ago is young."""

Stamp = tuple[int, int, int]
"""Size, time of writing and time of change of a file, in nanoseconds."""


def stamp_of(path: Path) -> Stamp:
    """Changes when a file changes, but for one that is young."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_young(stamp: Stamp) -> bool:
    """Whether the file may change without another stamp."""
    return max(stamp[1:]) > time.time_ns() - SETTLED_NS


def content_digest(path: Path) -> str:
    """Hex sha256 of a file's content, remembered on this machine by path and stamp."""
    path = path.resolve()
    stamp = stamp_of(path)
    young = is_young(stamp)  # before it is read
    remembered = cache_folder() / "digests" / digest_of([str(path), *stamp], 32)
    with contextlib.suppress(OSError):
        known = remembered.read_text()
        if len(known) == 64:
            return known
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    if not young and stamp_of(path) == stamp:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
            remembered.parent.mkdir(parents=True, exist_ok=True)
            temporary = remembered.with_name(f".{remembered.name}.{os.getpid()}")
            temporary.write_text(content)
            temporary.replace(remembered)
    return content


def content_digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """`content_digest` of files of a folder, by their path in it."""
    with ThreadPoolExecutor(4) as threads:
        digests = threads.map(lambda name: content_digest(folder / name), names)
    return dict(zip(names, digests, strict=True))


def cache_folder() -> Path:
    """Where downloads and digests are kept on this machine: GRAPE_CACHE, or ~/.cache/grape.

    Without a home that can be written, a temporary folder of this user alone. Raises UserError where that is another's.
    """
    if given := os.environ.get("GRAPE_CACHE"):
        return Path(given)
    home = Path(os.path.expanduser("~"))
    place = home / ".cache" / "grape"
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if home.is_absolute() and nearest != Path("/") and os.access(nearest, os.W_OK):
        return place
    return temporary_folder("grape-cache", variable="GRAPE_CACHE")
