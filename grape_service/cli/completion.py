"""Shell completion of references: the datasets of a folder, their versions and tags."""

from __future__ import annotations

import os
import re

from grape_service.errors import StageError, UserError

WAIT_SECONDS = 2.0
"""How long a server is waited for: a shell that hangs is worse than one that completes nothing."""
_BREAKS = re.compile(r"[:@=]+")
_before = ""
"""The part of the word that the shell keeps: it replaces what follows."""


def complete_reference(incomplete: str) -> list[str]:
    """What a dataset reference that begins like this can go on with: names, or versions and tags after '@'."""
    from grape_service.release.catalog import list_datasets
    from grape_service.storage.storage import Storage

    folder, slash, last = f"{_before}{incomplete}".rpartition("/")
    name, at, begun = last.partition("@")
    try:
        storage = Storage(folder or ".", {"retry_seconds": WAIT_SECONDS})
        if not at:
            names = [known for known in list_datasets(storage) if known.startswith(name)]
            if len(names) != 1:
                return _shown([f"{folder}{slash}{known}" for known in names])
            name = names[0]
        return _shown([f"{folder}{slash}{name}@{known}" for known in versions_and_tags(storage, name, begun)])
    except (UserError, StageError, OSError):
        return []


def versions_and_tags(storage: object, name: str, begun: str) -> list[str]:
    """Tags, then versions, newest first, that begin like this."""
    from grape_service.release.reference import VERSION_PATTERN
    from grape_service.release.tags import list_tag_names
    from grape_service.storage.storage import Storage

    assert isinstance(storage, Storage)
    folders = storage.folders(f"{name}/versions")
    versions = [version for version in reversed(folders) if VERSION_PATTERN.fullmatch(version)]
    return [known for known in [*list_tag_names(storage, name), *versions] if known.startswith(begun)]


def _shown(completions: list[str]) -> list[str]:
    return [completion.removeprefix(_before) for completion in completions]


def rejoin_words() -> None:
    """Mend what bash hands over: it cuts words at ':', '@' and '=', and replaces only what follows the last of them."""
    global _before
    if os.environ.get("_GRAPE_COMPLETE") != "complete_bash":
        return
    at = int(os.environ.get("COMP_CWORD", "0"))
    pieces = os.environ.get("COMP_WORDS", "").split("\n")[: at + 1]
    words: list[str] = []
    glue = False
    for piece in pieces:
        is_break = _BREAKS.fullmatch(piece) is not None
        if words and (is_break or glue):
            words[-1] += piece
        else:
            words.append(piece)
        glue = is_break
    kept = re.match(r".*[:@=]", words[-1])
    _before = kept[0] if kept else ""
    words[-1] = words[-1].removeprefix(_before) or '""'
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(words), str(len(words) - 1)
