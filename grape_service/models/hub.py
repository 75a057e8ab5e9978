"""Whether a snapshot in the local hub cache still holds what the hub gave.

huggingface_hub keeps each file under the name that the hub has for its content (sha256 for large files, git's sha1 for
the others) and links to it from the snapshot. So a file that was cut short, damaged or edited in the cache shows.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from grape_service.models.digests import content_digest

SHA256, GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def proves_its_commit(snapshot: Path, names: list[str]) -> bool:
    """Whether each file of a snapshot, by its path in it, is a link to content that has the name which the hub gave."""
    return all((snapshot / name).is_symlink() and _has_its_name((snapshot / name).resolve()) for name in names)


def _has_its_name(blob: Path) -> bool:
    if SHA256.fullmatch(blob.name):
        return content_digest(blob) == blob.name
    if GIT_SHA1.fullmatch(blob.name):
        content = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name
    return False
