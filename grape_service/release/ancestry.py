"""What a checkpoint was trained on, told back to the pool's files, and the other way round: which versions and
checkpoints hold a row, a source or a pool file, for a license that is withdrawn or a test that leaked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.schema import NAME_PATTERN
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.models.whole import MARKER
from grape_service.release.catalog import read_catalog
from grape_service.release.lineage import Node, short_lineage, trained_version, training_runs
from grape_service.release.load import Release, load
from grape_service.release.reference import parse_reference
from grape_service.release.rounds import all_rounds, round_of_run
from grape_service.rows.columns import IDS
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage

MAX_DEPTH = 50
"""Checkpoints that were trained one from the other."""


def facts_of(checkpoint: str, options: StorageOptions) -> dict[str, Any] | None:
    """What a checkpoint folder says it was made from: stage, dataset, model, steps; None where it says nothing."""
    try:
        facts = Storage(checkpoint, options).read_json(MARKER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts if isinstance(facts, dict) and isinstance(facts.get("dataset"), str) else None


def ancestors(checkpoint: str, options: StorageOptions) -> list[tuple[str, dict[str, Any]]]:
    """A checkpoint and those that it was trained from, newest first, each with its facts.

    Raises UserError for a folder that is not a checkpoint of our trainers.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    place = checkpoint.rstrip("/")
    while len(found) < MAX_DEPTH and place not in [known for known, _ in found]:
        facts = facts_of(place, options)
        if facts is None:
            break
        found.append((place, facts))
        place = str(facts.get("model") or "").rstrip("/")
    if not found:
        raise UserError(
            f"'{checkpoint}' is neither a dataset version nor a checkpoint of our trainers: those hold {MARKER}, which "
            "names the version"
        )
    return found


def lineage_of_checkpoint(checkpoint: str, options: StorageOptions) -> Node:
    """The tree of a checkpoint: each training with its settings in words, its release down to the pool's files."""
    node: Node | None = None
    for place, facts in reversed(ancestors(checkpoint, options)):
        children = [_version_node(facts["dataset"], options)]
        children.append(node if node is not None else Node(f"from the model {facts.get('model')}"))
        node = Node(f"{place}  {_words(facts, options)}", children)
    assert node is not None, "there is at least the checkpoint itself"
    return node


def _words(facts: dict[str, Any], options: StorageOptions) -> str:
    dataset = parse_reference(facts["dataset"])
    found = round_of_run(all_rounds(dataset.storage(options), dataset.name), facts.get("run"))
    counts = [f"{facts[name]:,} {name}" for name in ("rows", "prompts", "steps") if isinstance(facts.get(name), int)]
    run = [f"run {facts['run']}"] if facts.get("run") else []
    round_ = [found.name] if found is not None else []
    return ", ".join([str(facts.get("stage", "training")), *round_, *counts, *run])


def _version_node(reference: str, options: StorageOptions) -> Node:
    try:
        return short_lineage(load(reference, options))
    except UserError as error:
        return Node(f"{reference} (gone: {error})")


def rows_of_checkpoint(checkpoint: str, options: StorageOptions) -> Iterator[pa.Table]:
    """Ids of every row of every release that a checkpoint was trained on, as tables of IDS.

    Raises UserError where a release is gone.
    """
    for reference in dict.fromkeys(facts["dataset"] for _, facts in ancestors(checkpoint, options)):
        yield from rows_of_release(load(reference, options))


def rows_of_release(release: Release) -> Iterator[pa.Table]:
    """Ids of a version's rows, as tables of IDS."""
    for batch in release.batches(columns=IDS.names[1:]):
        table = pa.Table.from_batches([batch])
        names = pa.array([release.reference] * table.num_rows, pa.string())
        yield table.add_column(0, "release", names).select(IDS.names).cast(IDS)


@dataclass(frozen=True)
class Wanted:
    """What is looked for: one of these."""

    row: str | None = None  # a prompt_id or a candidate_id
    source: str | None = None
    file: str | None = None  # a pool file, or the end of its address


@dataclass(frozen=True)
class Holder:
    """A version that holds what is looked for, and what was trained on it."""

    reference: str
    rows: int | None  # None for a pool file: rows do not say which file they are from
    checkpoints: list[str] = field(default_factory=list)

    def to_json(self) -> JsonObject:
        """For --json."""
        return {"reference": self.reference, "rows": self.rows, "checkpoints": self.checkpoints}


def holders(folder: str, wanted: Wanted, options: StorageOptions) -> list[Holder]:
    """Every version below a folder of datasets that holds what is looked for, by name, the oldest first."""
    storage = Storage(folder, options)
    found = []
    for name in sorted(name for name in storage.folders() if NAME_PATTERN.fullmatch(name)):
        runs = None
        for entry in read_catalog(storage, name):
            release = load(f"{storage.root}/{name}@{entry.version}", options)
            rows = _held(release, wanted)
            if rows == 0:
                continue
            runs = training_runs(storage, name) if runs is None else runs
            trained = [run for run in runs if trained_version(run) == entry.version]
            found.append(Holder(release.reference, rows, _checkpoints(trained)))
    return found


def _held(release: Release, wanted: Wanted) -> int | None:
    """Rows of a version that are looked for; of a pool file, None where it is a parent and 0 where not."""
    if wanted.file is not None:
        paths = [item.path for item in release.manifest.parents.pool]
        return None if any(path == wanted.file or path.endswith(f"/{wanted.file}") for path in paths) else 0
    if wanted.source is not None:
        return int(release.dataset.count_rows(filter=pc.field("source") == wanted.source))
    is_row = (pc.field("prompt_id") == wanted.row) | (pc.field("candidate_id") == wanted.row)
    return int(release.dataset.count_rows(filter=is_row))


def _checkpoints(runs: list[dict[str, Any]]) -> list[str]:
    stages = [stage for run in runs for stage in (run.get("stages") or {}).values() if isinstance(stage, dict)]
    return sorted({str(stage["checkpoint"]) for stage in stages if stage.get("checkpoint")})
