"""What nobody needs any more: unfinished versions, old untagged ones, scores and shards that no release uses."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import orjson

from grape_service.display import counted, visible
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.release.catalog import list_datasets, read_catalog, remove_from_catalog
from grape_service.release.claim import ABANDONED, BURNED, CLAIM, PUBLISHED, STALE_SECONDS
from grape_service.release.lineage import trained_version, training_runs
from grape_service.release.manifest import MANIFEST, Manifest, read_manifest
from grape_service.release.outputs import other_outputs
from grape_service.release.reference import VERSION_PATTERN, parse_reference, version_folder, version_number
from grape_service.release.tags import list_tags
from grape_service.score.store import AUDIT_SUFFIX, REPEAT_SUFFIX, SHUFFLED_SUFFIX, STOPPED_SUFFIX
from grape_service.storage.storage import FileInfo, Storage, json_bytes

DAY = 86_400.0
_LOOK_AGAIN_SECONDS = 10.0
UNFINISHED, VERSION, SCORES, PREPARED, RUN, CHECKS, TEMPORARY = (
    "unfinished version",
    "old version",
    "scores",
    "shards",
    "run",
    "findings of checks",
    "temporary files",
)
_WORDS = (
    (UNFINISHED, "1 unfinished version", "{count} unfinished versions"),
    (VERSION, "1 old version", "{count} old versions"),
    (SCORES, "scores of 1 policy", "scores of {count} policies"),
    (PREPARED, "shards of 1 pool", "shards of {count} pools"),
    (RUN, "1 run", "{count} runs"),
    (CHECKS, "findings of 1 run", "findings of {count} runs"),
    (TEMPORARY, "temporary files", "temporary files"),
)
"""How kinds are counted in a sentence."""


_MEANING = {
    UNFINISHED: "versions that were never finished, which nobody can read",
    VERSION: "old versions, whose rows can then no longer be loaded",
    SCORES: "scores, which a run that needs them has to make again",
    PREPARED: "shards, which a run that needs them has to prepare again",
    RUN: "folders of runs: configs, failures and what lay between the stages",
    CHECKS: "findings of data checks",
    TEMPORARY: "temporary files and unfinished uploads of writers that were killed",
}
"""What goes with each kind."""


@dataclass(frozen=True)
class Garbage:
    """One thing that can go."""

    kind: str
    path: str  # full address
    num_files: int
    num_bytes: int
    reason: str

    def to_json(self) -> JsonObject:
        """For --json."""
        return asdict(self)


def collect(
    output: Storage,
    workspace: Storage | None,
    keep_days: float = 30,
    keep_versions: int = 10,
    dry_run: bool = True,
    stale_seconds: float = STALE_SECONDS,
    now: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Garbage]:
    """Find, and unless `dry_run` delete, what nobody needs:

    - versions that were never finished, whose writer gave no sign of life for `stale_seconds`;
    - versions beyond the last `keep_versions` of their dataset, without a tag, that no kept manifest names as parent
      and that nothing was trained on;
    - scores, shards and run folders of the workspace, older than `keep_days`, that no kept manifest of the last
      `keep_days` and no tagged one was made from;
    - temporary files and parts of uploads that killed writers left, older than a day.

    What the releases of other outputs with the same workspace were made from stays too; nothing goes where one of those
    outputs cannot be seen. While a run has a heartbeat in the workspace, only unfinished versions and temporary files
    go, which `say` is told.
    Times are those of the stores' own clocks, and `now` is for both. Raises UserError where there is no dataset, so
    that nothing would be in use, and where a manifest cannot be read: then nobody knows what it needs.
    """
    assert keep_days >= 0
    assert keep_versions >= 0
    names = _datasets_in(output)
    others = other_outputs(workspace, output) if workspace is not None else []
    output_now = output.now() if now is None else now
    workspace_now = workspace.now() if workspace and now is None else output_now
    alive = _alive_runs(workspace, workspace_now, stale_seconds) if workspace else set()
    if alive:
        runs = ", ".join(sorted(alive))
        say(f"a run is under way ({runs}): old versions, scores, shards and runs stay until it has ended")
    garbage: list[Garbage] = []
    kept: list[tuple[Manifest, bool]] = []  # and whether it has a tag
    old: list[tuple[str, str, Garbage]] = []
    for name in names:
        garbage += _unfinished(output, name, output_now, stale_seconds, dry_run)
    manifests = {name: _manifests(output, name) for name in names}
    if not alive:
        old = _old_versions(output, manifests, keep_versions)
    going = {(name, version) for name, version, _ in old}
    for name, versions in manifests.items():
        tagged = {tag.version for tag in list_tags(output, name)}
        kept += [(m, version in tagged) for version, m in versions.items() if (name, version) not in going]
    garbage += [item for name, version, item in old if dry_run or _delete_version(output, name, version)]
    for other in others:
        for name in list_datasets(other):
            tagged = {tag.version for tag in list_tags(other, name)}
            kept += [(m, version in tagged) for version, m in _manifests(other, name).items()]
    if workspace is not None and not alive:
        unused = _workspace_garbage(workspace, kept, workspace_now - keep_days * DAY)
        garbage += unused if dry_run else _delete_unused(workspace, unused, workspace_now, stale_seconds)
    return [*garbage, *_left_by_writers(output, workspace, dry_run)]


def render_text(garbage: list[Garbage], dry_run: bool) -> str:
    """What goes, in words: what it is, why, and what is lost with it."""
    if not garbage:
        return "nothing to delete: everything here is in use, young, or has a tag"
    verb = "would delete" if dry_run else "deleted"
    lines = []
    for kind, meaning in _MEANING.items():
        items = [item for item in garbage if item.kind == kind]
        lines += [f"{verb} {meaning}:"] if items else []
        lines += [f"  {visible(item.path)}: {_amount(item.num_files, item.num_bytes)}; {item.reason}" for item in items]
    counts = Counter(item.kind for item in garbage)
    words = [(kind, one if counts[kind] == 1 else more) for kind, one, more in _WORDS if counts[kind]]
    *first, last = [phrase.format(count=counts[kind]) for kind, phrase in words]
    what = f"{', '.join(first)} and {last}" if first else last
    size = _size(sum(item.num_bytes for item in garbage))
    if dry_run:
        return "\n".join([*lines, f"{what}, {size}: nothing has been deleted yet; run again with --delete"])
    return "\n".join([*lines, f"deleted {what}, {size}"])


def _amount(num_files: int, num_bytes: int) -> str:
    return f"{counted(num_files, 'file')}, {_size(num_bytes)}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _datasets_in(output: Storage) -> list[str]:
    """Names of the datasets. Raises UserError where there is none: then every score in the workspace would go."""
    names = list_datasets(output)
    if names:
        return names
    if output.folders("versions"):
        folder = output.root.rpartition("/")[0]
        raise UserError(
            f"{output.root} is one dataset, and datasets share scores: give the folder of all of them, {folder}"
        )
    raise UserError(f"there is no dataset in {output.root}: give the output.path of your configs")


def _left_by_writers(output: Storage, workspace: Storage | None, dry_run: bool) -> list[Garbage]:
    garbage = []
    inside = workspace is not None and f"{workspace.root}/".startswith(f"{output.root}/")
    for storage in [output] if inside or workspace is None else [output, workspace]:
        found = storage.unfinished(older_than=DAY)
        if found:
            garbage.append(_garbage(TEMPORARY, storage, "", found, "begun more than a day ago"))
        if not dry_run:
            storage.delete_unfinished(found)
    return garbage


# Versions


def _unfinished(output: Storage, name: str, now: float, stale_seconds: float, dry_run: bool) -> list[Garbage]:
    finished = {entry.version for entry in read_catalog(output, name)}
    garbage, gone = [], []
    for version in output.folders(f"{name}/versions"):
        if not VERSION_PATTERN.fullmatch(version) or version in finished:
            continue
        folder = version_folder(name, version)
        if output.exists(f"{folder}/{MANIFEST}"):
            continue  # published a moment ago, or not readable: not ours to judge
        claim, etag, age = _read_claim(output, folder, now)
        ended = claim.get("state") in (ABANDONED, BURNED)
        if not ended and age < stale_seconds:
            continue
        files = [info for info in output.list(folder) if info.path != f"{folder}/{CLAIM}"]
        if files:
            reason = "given up by its writer" if ended else f"no sign of life for {age / 3600:.1f} hours"
            garbage.append(_garbage(UNFINISHED, output, folder, files, reason))
        if not dry_run and _burn(output, folder, claim, etag):
            for info in files:
                output.delete(info.path)
            gone.append(version)
    if gone:
        remove_from_catalog(output, name, gone)
    return garbage


def _read_claim(output: Storage, folder: str, now: float) -> tuple[JsonObject, str | None, float]:
    """A claim, its etag, and how long ago it was renewed, by the store's clock and not the writer's; a folder without
    one is as old as its newest file."""
    try:
        data, etag = output.read_with_etag(f"{folder}/{CLAIM}")
        age = now - output.info(f"{folder}/{CLAIM}").modified
    except FileNotFoundError:
        return {}, None, now - max((info.modified for info in output.list(folder)), default=0.0)
    try:
        claim = orjson.loads(data)
    except orjson.JSONDecodeError:
        claim = {}
    return claim if isinstance(claim, dict) else {}, etag, age


def _burn(output: Storage, folder: str, claim: JsonObject, etag: str | None) -> bool:
    """Take a dead writer's claim away; the number stays claimed for ever. False if the writer lives after all."""
    if claim.get("state") == BURNED:
        return True
    burned = {**claim, "state": BURNED, "writer": f"gc, instead of {claim.get('writer', 'nobody')}"}
    if not output.compare_and_swap(f"{folder}/{CLAIM}", json_bytes(burned), etag):
        return False
    return not output.exists(f"{folder}/{MANIFEST}")


def _manifests(output: Storage, name: str) -> dict[str, Manifest]:
    versions = [
        version
        for version in output.folders(f"{name}/versions")
        if VERSION_PATTERN.fullmatch(version) and output.exists(f"{version_folder(name, version)}/{MANIFEST}")
    ]
    return {version: read_manifest(output, name, version) for version in sorted(versions, key=version_number)}


def _old_versions(
    output: Storage, manifests: dict[str, dict[str, Manifest]], keep_versions: int
) -> list[tuple[str, str, Garbage]]:
    candidates: set[tuple[str, str]] = set()
    for name, versions in manifests.items():
        needed = {tag.version for tag in list_tags(output, name)}
        needed |= {version for run in training_runs(output, name) if (version := trained_version(run))}
        last = list(versions)[len(versions) - keep_versions :] if keep_versions else []
        candidates |= {(name, version) for version in versions if version not in needed and version not in last}
    # A parent of what stays stays, and so on.
    waiting = [m for name, versions in manifests.items() for v, m in versions.items() if (name, v) not in candidates]
    while waiting:
        for parent in _parents(output, waiting.pop()) & candidates:
            candidates.discard(parent)
            waiting.append(manifests[parent[0]][parent[1]])
    reason = f"no tag, and not among the {keep_versions} newest of its dataset"
    return [
        (name, version, _garbage(VERSION, output, folder, output.list(folder), reason))
        for name, version in sorted(candidates)
        for folder in [version_folder(name, version)]
    ]


def _parents(output: Storage, manifest: Manifest) -> set[tuple[str, str]]:
    """Name and version of the release that this one was weighed from, and of the candidates that were its pool, where
    these lie beside it."""
    found = []
    for text in filter(None, (manifest.parents.release, *manifest.parents.candidates.values())):
        with contextlib.suppress(UserError):
            found.append(parse_reference(text))
    return {(reference.name, reference.version_or_tag) for reference in found if reference.path == output.root}


def _delete_version(output: Storage, name: str, version: str) -> bool:
    """Delete a version, unless a tag has come to it meanwhile; whether it is gone.

    The claim is marked first: who moves a tag here from now on sees that and takes it back. Then the manifest goes, and
    with it the version. The claim stays, so the number is never given again.
    """
    folder = version_folder(name, version)
    claim, etag, _ = _read_claim(output, folder, 0.0)
    if not output.compare_and_swap(f"{folder}/{CLAIM}", json_bytes({**claim, "state": BURNED}), etag):
        return False
    if any(tag.version == version for tag in list_tags(output, name)):
        output.write_json(f"{folder}/{CLAIM}", {**claim, "state": PUBLISHED})
        return False
    output.delete(f"{folder}/{MANIFEST}")
    for info in output.list(folder):
        if info.path != f"{folder}/{CLAIM}":
            output.delete(info.path)
    remove_from_catalog(output, name, [version])
    return True


def _created(manifest: Manifest) -> float:
    return datetime.datetime.fromisoformat(manifest.created).timestamp()


# Workspace


def _alive_runs(workspace: Storage, now: float, stale_seconds: float) -> set[str]:
    beats = [info for info in workspace.list("runs") if info.path.endswith("/heartbeat.json")]
    return {info.path.split("/")[1] for info in beats if now - info.modified < stale_seconds}


def _delete_unused(workspace: Storage, unused: list[Garbage], now: float, stale_seconds: float) -> list[Garbage]:
    """Delete folders of the workspace; stops when a run begins meanwhile. Returns those that are gone."""
    checked = 0.0
    for i, item in enumerate(unused):
        if time.monotonic() - checked > _LOOK_AGAIN_SECONDS:
            if _alive_runs(workspace, now, stale_seconds):
                return unused[:i]
            checked = time.monotonic()
        workspace.delete_folder(item.path.removeprefix(f"{workspace.root}/"))
    return unused


def _workspace_garbage(workspace: Storage, kept: list[tuple[Manifest, bool]], before: float) -> list[Garbage]:
    used = [m for m, tagged in kept if tagged or _created(m) >= before]
    policies = {policy.policy_id for manifest in used for policy in manifest.parents.policies}
    suffixes = (AUDIT_SUFFIX, REPEAT_SUFFIX, SHUFFLED_SUFFIX, STOPPED_SUFFIX)
    policies |= {f"{policy_id}{suffix}" for policy_id in policies for suffix in suffixes}
    prepared = {manifest.parents.prepare_id for manifest in used}
    runs = {manifest.parents.run_id for manifest in used}
    garbage: list[Garbage] = []
    tops = (
        (SCORES, "scores", policies),
        (PREPARED, "prepared", prepared),
        (RUN, "runs", runs),
        (CHECKS, "checks", runs),
    )
    for kind, top, needed in tops:
        for name, files in _by_folder(workspace.list(top)).items():
            if name not in needed and max(info.modified for info in files) < before:
                folder = f"{top}/{name}"
                garbage.append(
                    _garbage(
                        kind,
                        workspace,
                        folder,
                        files,
                        "no release that has a tag or is younger than --keep-days uses it",
                    )
                )
    return garbage


def _by_folder(infos: Iterable[FileInfo]) -> dict[str, list[FileInfo]]:
    """Files by the second part of their path."""
    found: dict[str, list[FileInfo]] = {}
    for info in infos:
        if info.path.count("/") >= 2:
            found.setdefault(info.path.split("/")[1], []).append(info)
    return found


def _garbage(kind: str, storage: Storage, folder: str, files: list[FileInfo], reason: str) -> Garbage:
    return Garbage(kind, storage.url(folder), len(files), sum(info.size for info in files), reason)
