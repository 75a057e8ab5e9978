"""What a checkpoint was trained on, told back to the pool's files, and the other way round: which versions and
checkpoints hold a row, a source or a pool file, for a license that is withdrawn or a test that leaked.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.models.whole import MARKER, CheckpointFacts
from grape_service.release.catalog import list_datasets, read_catalog
from grape_service.release.lineage import Node, short_lineage, trained_version, training_runs
from grape_service.release.load import Release, load
from grape_service.release.pool_files import paths_of
from grape_service.release.reference import parse_reference
from grape_service.release.rounds import all_rounds, round_of_run
from grape_service.rows.columns import IDS
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage, normal_url

MAX_DEPTH = 50
"""Checkpoints that were trained one from the other."""
SETTINGS = ("epochs", "learning_rate", "loss")
"""What is told of a training's settings: the checkpoint's marker has all of them."""


def facts_of(checkpoint: str, options: StorageOptions) -> CheckpointFacts | None:
    """What a checkpoint folder says it was made from: stage, dataset, model, steps; None where it says nothing."""
    try:
        facts: CheckpointFacts = Storage(checkpoint, options).read_json(MARKER)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts if isinstance(facts, dict) and isinstance(facts.get("dataset"), str) else None


def is_checkpoint(what: str, options: StorageOptions) -> bool:
    """Whether an address is that of a checkpoint of our trainers, and not a dataset's.

    Raises UserError for a folder that holds a model or a training job's files, and says nothing of what it is of.
    """
    if "@" in what:
        return False
    if facts_of(what, options) is not None:
        return True
    for inside in ("model", "sft/model", "rl/model"):
        if facts_of(f"{what.rstrip('/')}/{inside}", options) is not None:
            raise UserError(f"'{what}' is a training job's folder: name its checkpoint, {what.rstrip('/')}/{inside}")
    folder = Storage(what, options)
    if any(folder.exists(name) for name in ("config.json", "adapter_config.json")):
        raise _says_nothing(what)
    return False


def _says_nothing(checkpoint: str) -> UserError:
    return UserError(
        f"'{checkpoint}' is neither a dataset version nor a checkpoint of our trainers: those hold {MARKER}, which "
        "names the version"
    )


def ancestors(checkpoint: str, options: StorageOptions) -> list[tuple[str, CheckpointFacts]]:
    """A checkpoint and those that it was trained from, newest first, each with its facts.

    Raises UserError for a folder that is not a checkpoint of our trainers.
    """
    found: list[tuple[str, CheckpointFacts]] = []
    place = checkpoint.rstrip("/")
    while len(found) < MAX_DEPTH and place not in [known for known, _ in found]:
        facts = facts_of(place, options)
        if facts is None:
            break
        found.append((place, facts))
        place = str(facts.get("model") or "").rstrip("/")
    if not found:
        raise _says_nothing(checkpoint)
    return found


def lineage_of_release(release: Release) -> Node:
    """The tree of a version for people; where its target is a checkpoint of our trainers, with that one's own."""
    node = short_lineage(release)
    target = str((release.manifest.config.get("target") or {}).get("model") or "").rstrip("/")
    if target and facts_of(target, release.storage.options) is not None:
        node.children.append(lineage_of_checkpoint(target, release.storage.options))
    return node


def lineage_of_checkpoint(checkpoint: str, options: StorageOptions) -> Node:
    """The tree of a checkpoint: each training with its settings in words, its release down to the pool's files."""
    node: Node | None = None
    for place, facts in reversed(ancestors(checkpoint, options)):
        children = [_version_node(facts["dataset"], options)]
        children.append(node if node is not None else Node(f"from the model {facts.get('model')}"))
        node = Node(f"{place}  {_words(facts, options)}", children)
    assert node is not None, "there is at least the checkpoint itself"
    return node


def _words(facts: CheckpointFacts, options: StorageOptions) -> str:
    dataset = parse_reference(facts["dataset"])
    found = round_of_run(all_rounds(dataset.storage(options), dataset.name), facts.get("run"))
    counts = [f"{facts[name]:,} {name}" for name in ("rows", "prompts", "steps") if isinstance(facts.get(name), int)]
    run = [f"run {facts['run']}"] if facts.get("run") else []
    round_ = [found.name] if found is not None else []
    settings = facts.get("settings") or {}
    known = [f"{name.replace('_', ' ')} {settings[name]}" for name in SETTINGS if settings.get(name) is not None]
    return ", ".join([str(facts.get("stage", "training")), *round_, *counts, *known, *run])


def _version_node(reference: str, options: StorageOptions) -> Node:
    try:
        return short_lineage(load(reference, options))
    except UserError as error:
        return Node(f"{reference} (gone: {error})")


def rows_of_checkpoint(checkpoint: str, options: StorageOptions) -> Iterator[pa.Table]:
    """Ids of every row of every release that a checkpoint was trained on, as tables of IDS.

    Raises UserError where a release is gone, before the first table.
    """
    references = dict.fromkeys(facts["dataset"] for _, facts in ancestors(checkpoint, options))
    releases = [load(reference, options) for reference in references]
    return itertools.chain.from_iterable(map(rows_of_release, releases))


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
    file: str | None = None  # a pool file or a folder of them, or the end of its address


@dataclass(frozen=True)
class Holder:
    """A version that holds what is looked for, and what was trained on it."""

    reference: str
    rows: int | None  # None for a pool file: rows do not say which file they are from
    checkpoints: list[str] = field(default_factory=list)
    descendants: list[str] = field(default_factory=list)  # checkpoints that were trained further from those

    def to_json(self) -> JsonObject:
        """For --json."""
        return {
            "reference": self.reference,
            "rows": self.rows,
            "checkpoints": self.checkpoints,
            "descendants": self.descendants,
        }


def holders(folder: str, wanted: Wanted, options: StorageOptions) -> list[Holder]:
    """Every version below a folder of datasets that holds what is looked for, by name, the oldest first, with the
    checkpoints that were trained on it and those that were trained further from them.

    Raises UserError where there is no dataset.
    """
    storage = Storage(folder, options)
    names = list_datasets(storage)
    if not names:
        if storage.folders("versions"):
            raise UserError(f"{storage.root} is a dataset: name the folder that it is in")
        raise UserError(f"there is no dataset in {storage.root}: name a folder of datasets, as output.path has it")
    found = []
    for name in names:
        for entry in read_catalog(storage, name):
            release = load(f"{storage.root}/{name}@{entry.version}", options)
            rows = _held(release, wanted)
            if rows != 0:
                found.append((release.reference, rows))
    trained = _Trained(storage, names, options) if found else None
    return [Holder(reference, rows, *trained.on(reference)) for reference, rows in found if trained is not None]


def _held(release: Release, wanted: Wanted) -> int | None:
    """Rows of a version that are looked for; of a pool file, None where it is a parent and 0 where not."""
    if wanted.file is not None:
        return None if any(_is_of(path, wanted.file) for path in _files_of(release, set())) else 0
    by_source = wanted.source is not None
    names = ["source"] if by_source else ["prompt_id", "candidate_id"]
    value = wanted.source if by_source else wanted.row
    dataset = release.dataset  # gathered candidates have no candidate_id
    found = [pc.field(name) == value for name in names if name in dataset.schema.names]
    return int(dataset.count_rows(filter=functools.reduce(operator.or_, found))) if found else 0


def _is_of(path: str, wanted: str) -> bool:
    """Whether a file is the one that is looked for, or in that folder."""
    return f"/{wanted.strip('/')}/" in f"/{path.strip('/')}/"


def _files_of(release: Release, seen: set[str]) -> Iterator[str]:
    """Files that a version was made from: its pool, prompts that gather sampled for, those of released candidates."""
    parents = release.manifest.parents
    yield from paths_of(release)
    for reference in set(parents.candidates.values()) - seen:
        try:
            candidates = load(reference, release.storage.options)
        except UserError:  # they are gone, and what they were made from with them
            continue
        yield from _files_of(candidates, seen | set(parents.candidates.values()))


class _Trained:
    """What was trained on which version, of all training runs of a folder of datasets."""

    def __init__(self, storage: Storage, names: list[str], options: StorageOptions):
        self.options = options
        self.direct: dict[str, tuple[str, str]] = {}  # of a checkpoint, its version and the model that it started from
        for name in names:
            for run in training_runs(storage, name):
                reference = f"{storage.root}/{name}@{trained_version(run)}"
                for checkpoint in _checkpoints(run):
                    self.direct[_place(checkpoint)] = reference, _place(str(run.get("target") or ""))
        self.versions = {checkpoint: self._versions(checkpoint) for checkpoint in self.direct}

    def on(self, reference: str) -> tuple[list[str], list[str]]:
        """Checkpoints that were trained on a version, and those that were trained further from such a checkpoint."""
        own = {checkpoint for checkpoint, (version, _) in self.direct.items() if version == reference}
        further = {checkpoint for checkpoint, versions in self.versions.items() if reference in versions} - own
        return sorted(own), sorted(further)

    def _versions(self, checkpoint: str) -> set[str]:
        """Versions that a checkpoint or one that it comes from was trained on, as far as anyone says it."""
        versions: set[str] = set()
        places: set[str] = set()
        while checkpoint and checkpoint not in places:
            places.add(checkpoint)
            facts = facts_of(checkpoint, self.options)
            version, model = self.direct.get(checkpoint, ("", ""))
            if facts is not None:
                version, model = facts["dataset"], _place(str(facts.get("model") or ""))
            versions.add(version)
            checkpoint = model
        return versions


def _place(address: str) -> str:
    """An address by which the same folder is found again; a hub's model is no folder."""
    try:
        return normal_url(address) if address else ""
    except UserError:
        return address


def _checkpoints(run: JsonObject) -> list[str]:
    stages = [stage for stage in (run.get("stages") or {}).values() if isinstance(stage, dict)]
    return [str(stage["checkpoint"]) for stage in stages if stage.get("checkpoint")]
