"""A version as a commit of a dataset repository on the Hugging Face Hub, with a tag of the version's name.

All files of the version go up, its card with the Hub's header among them, so that `datasets.load_dataset(repo,
revision="v0003")` gives its rows. Files go up one by one before the commit is made; the Hub knows those that it has by
their content, so an upload that was broken off goes on where it was.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grape_service.errors import StageError, UserError
from grape_service.release.load import Release
from grape_service.release.manifest import MANIFEST

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HELD_BYTES = 8 * 2**20
"""Smaller files are held in memory until the commit, which takes some of them as they are."""


@dataclass(frozen=True)
class HubExport:
    """What is on the Hub now."""

    repo: str
    tag: str
    commit: str
    files: int
    is_new: bool

    @property
    def lines(self) -> list[str]:
        """For people."""
        what = f"{self.files:,} files in one commit" if self.is_new else "it was there already"
        return [
            f"{self.repo} has the tag {self.tag} at commit {self.commit}: {what}",
            f'read it with datasets.load_dataset("{self.repo}", revision="{self.tag}")',
        ]


def export_to_hub(release: Release, repo: str, say: Callable[[str], None] = lambda text: None) -> HubExport:
    """Upload a version to the dataset repository `repo`, which is made, private, where there is none.

    Files of other versions in its main branch make room; their tags keep them. HF_TOKEN is the token, HF_ENDPOINT
    another server. Raises UserError where the Hub refuses, the tag is another version's or a file is damaged, and
    StageError where the Hub cannot be reached.
    """
    if not REPO.fullmatch(repo):
        raise UserError(f"'{repo}' is no repository of the Hub: write owner/name")
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return _upload(HfApi(library_name="grape-service"), release, repo, say)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise UserError(f"the Hub refuses to write to {repo}: set HF_TOKEN to a token that may") from None
        sentence = f"the Hub answers {status} for {repo}: {error.server_message or 'it gives no reason'}"
        raise (UserError if 400 <= status < 500 else StageError)(f"{sentence}; run again to go on") from None
    except UnicodeEncodeError:
        raise UserError("HF_TOKEN is no token: it holds a character that no header may have") from None
    except (httpx.TransportError, OSError, RuntimeError) as error:  # a RuntimeError of an upload that failed
        raise StageError(f"the upload to {repo} was broken off ({type(error).__name__}): run again to go on") from error


def _upload(api: Any, release: Release, repo: str, say: Callable[[str], None]) -> HubExport:
    from huggingface_hub import CommitOperationDelete

    where = {"repo_id": repo, "repo_type": "dataset"}
    api.create_repo(**where, private=True, exist_ok=True)
    manifest = release.storage.read(f"{release.folder}/{MANIFEST}")
    names = _files(release)
    refs = api.list_repo_refs(**where)
    tag = next((one for one in refs.tags if one.name == release.version), None)
    if tag is not None:
        if _holds(api, where, tag.target_commit, manifest):
            return HubExport(repo, release.version, tag.target_commit, len(names), is_new=False)
        raise UserError(
            f"the tag {release.version} of {repo} is another version than {release.reference}: delete the tag there, "
            "or choose another repository"
        )
    head = next((one.target_commit for one in refs.branches if one.name == "main"), None)
    if head is not None and _holds(api, where, head, manifest):  # the commit was made, and the tag not
        api.create_tag(**where, tag=release.version, revision=head)
        return HubExport(repo, release.version, head, len(names), is_new=False)
    with tempfile.TemporaryDirectory(prefix="grape-hub-") as folder:
        operations: list[Any] = [
            _sent(api, where, release, name, expected, Path(folder), say) for name, expected in sorted(names.items())
        ]
        old = [path for path in api.list_repo_files(**where) if path not in names and _is_of_a_version(path)]
        operations += [CommitOperationDelete(path_in_repo=path) for path in old]
        message = f"{release.name} {release.version}"
        commit = api.create_commit(**where, operations=operations, commit_message=message, parent_commit=head).oid
    api.create_tag(**where, tag=release.version, revision=commit)
    return HubExport(repo, release.version, commit, len(names), is_new=True)


def _files(release: Release) -> dict[str, str | None]:
    """The files of a version with the sha256 that its manifest names; None for the manifest itself."""
    manifest = release.manifest
    documents = {entry.path: entry.sha256 for entry in manifest.documents}
    return {MANIFEST: None, **documents, **{entry.path: entry.sha256 for entry in manifest.files}}


def _is_of_a_version(path: str) -> bool:
    return path.startswith("data/part-") or path in ("report.html", "changes.parquet", "croissant.json")


def _holds(api: Any, where: dict[str, str], revision: str, manifest: bytes) -> bool:
    """Whether a commit's manifest.json is this one: it names every file, and was committed with all of them."""
    found = api.get_paths_info(**where, paths=[MANIFEST], revision=revision)
    if not found:
        return False
    if found[0].lfs is not None:
        return bool(found[0].lfs.sha256 == hashlib.sha256(manifest).hexdigest())
    return bool(found[0].blob_id == hashlib.sha1(b"blob %d\0" % len(manifest) + manifest).hexdigest())


def _sent(
    api: Any,
    where: dict[str, str],
    release: Release,
    name: str,
    expected: str | None,
    folder: Path,
    say: Callable[[str], None],
) -> Any:
    """The operation that adds a file, whose content is on the Hub where the Hub takes it before the commit."""
    from huggingface_hub import CommitOperationAdd

    path = f"{release.folder}/{name}"
    try:
        size = release.storage.info(path).size
        digest = release.storage.sha256(path) if expected is not None else None
    except FileNotFoundError:
        raise UserError(f"{release.storage.url(path)} is missing: restore it before it goes to the Hub") from None
    if digest != expected:
        raise UserError(f"{release.storage.url(path)} is not what the manifest names: see `grape datasets verify`")
    local: Path | None = None
    if size <= HELD_BYTES:
        content: Any = release.storage.read(path)
    elif release.storage.is_s3:
        local = folder / name.replace("/", "-")
        with release.storage.open(path) as source, local.open("wb") as target:
            shutil.copyfileobj(source, target, 16 * 2**20)
        content = str(local)
    else:
        content = release.storage.full(path)
    operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
    api.preupload_lfs_files(**where, additions=[operation])
    say(f"{name}: {size:,} bytes")
    if local is not None and operation.path_or_fileobj != content:  # it is there, and not needed again
        local.unlink()
    return operation
