"""What a version was made from, and what was trained on it, as a tree: in full, and short for people."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from typing import Any

import orjson
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from grape_service.display import counted
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.release.load import Release, load
from grape_service.release.made_by import MadeBy
from grape_service.release.manifest import POOL_FILES, Manifest, Parents, PolicyUse, PoolFile
from grape_service.storage.storage import Storage

UNFOLLOWED = "running, followed by nobody"
"""A training run that may have ended: `grape train --status` asks for its job."""
MAX_POOL_FILES = 20
_MAX_DEPTH = 20


@dataclass(frozen=True)
class Node:
    """A line of the tree, and what hangs below it."""

    label: str
    children: list[Node] = field(default_factory=list)

    def to_json(self) -> JsonObject:
        """For --json."""
        return {"label": self.label, "children": [child.to_json() for child in self.children]}

    def render_text(self) -> str:
        """The tree as text; names from outside are escaped."""
        console = Console(width=10_000, color_system=None, file=io.StringIO())
        with console.capture() as captured:
            console.print(self._as_rich(), soft_wrap=True)
        return captured.get().rstrip("\n")

    def _as_rich(self) -> Tree:
        tree = Tree(Text(_shown(self.label)))
        for child in self.children:
            tree.add(child._as_rich())
        return tree


def short_lineage(release: Release) -> Node:
    """Names, states and final figures: pool, policies, the version that was weighed, training runs."""
    return _short_version(release, set())


def _short_version(release: Release, seen: set[str]) -> Node:
    manifest = release.manifest
    tags = release.tags()
    children = []
    for what, files, number in _files_of(manifest.parents):
        if files:
            more = f" and {counted(number - 1, 'more file')}" if number > 1 else ""
            children.append(Node(f"{what}: {files[0].path}{more}"))
    children += [Node(f"candidates: {version}") for version in manifest.parents.candidates.values()]
    policies = dict.fromkeys(f"{policy.role}: {policy.model}" for policy in manifest.parents.policies)
    children += [Node(label) for label in policies]
    parent = manifest.parents.release
    if parent:
        if parent in seen or len(seen) > _MAX_DEPTH:
            children.append(Node(f"weighed from {parent}"))
        else:
            try:
                node = _short_version(load(parent, release.storage.options), seen | {release.reference})
                children.append(Node(f"weighed from {node.label}", node.children))
            except UserError as error:
                children.append(Node(f"weighed from {parent} (gone: {error})"))
    runs = [run for run in training_runs(release.storage, release.name) if trained_version(run) == release.version]
    children += [_short_run(run) for run in runs]
    made_by = MadeBy.of(manifest.config)
    settings = [made_by.method] if made_by.method else []
    settings += [f"keep {made_by.keep}"] if made_by.keep else []
    if manifest.kind == "candidates":  # whose config says what another step makes of them
        settings = ["candidates"]
    size = f"{counted(manifest.rows, 'row')}, {counted(manifest.tokens, 'token')}"
    words = [f"{release.reference}  {', '.join([size, *settings])}", *([f"[{', '.join(tags)}]"] if tags else [])]
    return Node("  ".join(words), children)


def _short_run(run: JsonObject) -> Node:
    stages = run.get("stages")
    children = []
    for stage, entry in sorted(stages.items(), reverse=True) if isinstance(stages, dict) else ():  # sft before rl
        if isinstance(entry, dict):
            words = [f"{stage}: {entry.get('state', 'state unknown')}", *_final_figures(entry.get("metrics"))]
            checkpoint = entry.get("checkpoint")
            children.append(Node(", ".join(words), [Node(str(checkpoint))] if checkpoint else []))
    return Node(f"run {run['id']}: {run.get('state', 'state unknown')}", children)


def _final_figures(metrics: Any) -> list[str]:
    if not isinstance(metrics, dict):
        return []
    last = metrics.get("last")
    figures = {**metrics, **(last if isinstance(last, dict) else {})}
    named = (("loss", "loss"), ("ess", "effective sample size"), ("reward", "reward"), ("eval_loss", "eval loss"))
    return [f"{label} {figures[name]:.4g}" for name, label in named if isinstance(figures.get(name), int | float)]


def lineage_tree(release: Release) -> Node:
    """The tree of a version: counts, pool, policies, code, its parent version with its own tree, training runs."""
    return _version_node(release, set())


def training_runs(storage: Storage, name: str) -> list[JsonObject]:
    """Records of runs that trained on a dataset, `<name>/runs/<id>.json`; sorted by file name.

    One that runs as far as its record says, and that nobody follows, has the state UNFOLLOWED here.
    """
    records: list[JsonObject] = []
    for info in storage.list(f"{name}/runs"):
        if not info.path.endswith(".json") or info.path.count("/") != 2:
            continue
        try:
            record = orjson.loads(storage.read(info.path))
        except (orjson.JSONDecodeError, FileNotFoundError):
            continue
        if isinstance(record, dict):
            records.append({"id": info.path.rsplit("/", 1)[-1].removesuffix(".json"), **record})
    followed = {record["id"] for record in records if _is_followed(record)}
    for record in records:
        found = record.get("stages")
        stages = [entry for entry in found.values() if isinstance(entry, dict)] if isinstance(found, dict) else []
        if not followed & {record["id"], *(entry.get("run") for entry in stages)}:
            for one in (record, *stages):
                if one.get("state") == "running":
                    one["state"] = UNFOLLOWED
    return records


def _is_followed(record: JsonObject) -> bool:
    lease = record.get("lease")
    expires = lease.get("expires") if isinstance(lease, dict) else None
    return isinstance(expires, int | float) and expires > time.time()


def trained_version(record: JsonObject) -> str | None:
    """The version that a training run's record names, in `version` or at the end of `reference`."""
    version = record.get("version") or str(record.get("reference", "")).rpartition("@")[2]
    return str(version).rpartition("@")[2] or None


def _version_node(release: Release, seen: set[str]) -> Node:
    manifest = release.manifest
    children = [_counts_node(manifest)] if manifest.counts else []
    children += [_files_node(what, files, number) for what, files, number in _files_of(manifest.parents) if files]
    children += [Node(f"candidates: {version}") for version in manifest.parents.candidates.values()]
    children += [_policy_node(policy) for policy in manifest.parents.policies]
    code = manifest.parents.code
    if code is not None:
        children.append(Node(f"code: grape-service {code.package_version}, commit {code.git_commit or 'unknown'}"))
    if manifest.parents.libraries:
        libraries = ", ".join(f"{name} {version}" for name, version in sorted(manifest.parents.libraries.items()))
        children.append(Node(f"libraries: {libraries}"))
    if manifest.config:
        children.append(Node("config", _value_nodes(manifest.config)))
    if manifest.parents.release:
        children.append(_parent_node(release, manifest.parents.release, seen | {release.reference}))
    runs = [run for run in training_runs(release.storage, release.name) if trained_version(run) == release.version]
    children += [_run_node(run) for run in runs]
    tags = release.tags()
    label = f"{release.reference}  {manifest.rows:,} rows, {manifest.created}"
    return Node(label + (f"  [{', '.join(tags)}]" if tags else ""), children)


def _parent_node(release: Release, reference: str, seen: set[str]) -> Node:
    if reference in seen or len(seen) > _MAX_DEPTH:
        return Node(f"weighed from {reference}")
    try:
        node = _version_node(load(reference, release.storage.options), seen)
    except UserError as error:
        return Node(f"weighed from {reference} (gone: {error})")
    return Node(f"weighed from {node.label}", node.children)


def _counts_node(manifest: Manifest) -> Node:
    return Node("counts", _value_nodes(manifest.counts))


def _files_of(parents: Parents) -> list[tuple[str, list[PoolFile], int]]:
    """(What they are, those that the manifest lists, how many there were) of the pool's files and of the prompts'."""
    return [
        ("pool", parents.pool, parents.num_files("pool")),
        ("prompts", parents.prompts, parents.num_files("prompts")),
    ]


def _files_node(what: str, files: list[PoolFile], number: int) -> Node:
    shown = [
        Node(f"{item.path}  {item.size:,} bytes, {'digest ' + item.digest if item.digest else f'etag {item.etag}'}")
        for item in files[:MAX_POOL_FILES]
    ]
    if number > MAX_POOL_FILES:
        where = "the manifest" if number == len(files) else f"{POOL_FILES} beside the data"
        shown.append(Node(f"and {number - MAX_POOL_FILES:,} more in {where}"))
    return Node(f"{what}: {counted(number, 'file')}", shown)


def _policy_node(policy: PolicyUse) -> Node:
    known = policy.model_dump(exclude={"role", "model"}, exclude_none=True)
    return Node(f"{policy.role}: {policy.model}", _value_nodes(known))


def _run_node(run: JsonObject) -> Node:
    shown = ("kind", "job_id", "checkpoint", "output", "metrics")
    stages = run.get("stages")
    children = [
        Node(f"{stage}: {entry.get('state', 'state unknown')}", _value_nodes({k: entry.get(k) for k in shown}))
        for stage, entry in (stages.items() if isinstance(stages, dict) else ())
        if isinstance(entry, dict)
    ]
    return Node(f"trained on it: {run['id']}, {run.get('state', 'state unknown')}", children)


def _value_nodes(value: JsonObject) -> list[Node]:
    nodes = []
    for key, item in value.items():
        if isinstance(item, dict):
            nodes += [Node(str(key), _value_nodes(item))] if item else []
        elif item is not None:
            text = ", ".join(str(part) for part in item) if isinstance(item, list) else _number_or_text(item)
            nodes.append(Node(f"{key}: {text}"))
    return nodes


def _number_or_text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _shown(text: str) -> str:
    text = text if len(text) <= 300 else text[:297] + "..."
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
