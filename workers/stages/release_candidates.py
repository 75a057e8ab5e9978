"""Released candidates: what gather sampled becomes a version of its own, which other configs name as their pool."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from grape_service.release.claim import claim_version
from grape_service.release.manifest import FileEntry, ManifestFields
from grape_service.release.writer import find_identical, publish, write_part
from grape_service.rows.columns import RELEASE_FORMAT
from grape_service.storage.parquet import open_small, read_row_groups
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.stages.provenance import common_parents, policy_use, resolved_config, write_many_files
from workers.stages.release import point_tags


@dataclass(frozen=True)
class CandidatesPart:
    """The gathered files of one policy and partition, which become one data file."""

    partition: str
    paths: tuple[str, ...]


def release_candidates(run: Run, counts: dict[str, dict[str, Any]], folders: list[str]) -> str:
    """Publish the gathered files of these folders as a version of gather.release, unless one holds the same; its
    reference. The config's tags are moved to it."""
    config, output = run.config, run.output
    assert config.gather is not None
    assert config.gather.release is not None
    name = config.gather.release
    parts = [part for folder in folders for part in parts_of(run.workspace, folder)]
    shared: dict[str, Any] = {"storage": run.workspace}
    at_once = together(config.workers, len(parts))
    arguments = [{"part": part} for part in parts]
    described = list(run_tasks(describe_part, arguments, config.workers, shared=shared, together=at_once))
    schema = pa.unify_schemas([schema for _, schema in described], promote_options="permissive")
    fields = [RELEASE_FORMAT, [str(field) for field in schema], [digest for digest, _ in described]]
    content = hashlib.sha256(orjson.dumps(fields)).hexdigest()
    if (same := find_identical(output, name, content)) is not None:
        point_tags(run, same, name)
        return f"{output.root}/{name}@{same}"
    with claim_version(output, name) as claim:
        shared |= {"output": output, "folder": claim.folder, "schema": schema}
        numbered = [{"index": index, "part": part} for index, part in enumerate(parts)]
        entries = list(run_tasks(write_candidates_part, numbered, config.workers, shared=shared, together=at_once))
        policies = [policy_use(run, "behavior", config.gather.policy(policy)) for policy in counts]
        manifest = ManifestFields(
            kind="candidates",
            content_digest=content,
            counts={"gather": counts},
            config=resolved_config(config),
            parents=common_parents(run, policies),
            statistics={"sources": {policy: found["samples"] for policy, found in counts.items()}},
            tags=config.output.tags,
        )
        documents = write_many_files(run, claim.folder)
        version = publish(output, claim, schema, entries, manifest, documents=documents)
    return version.reference


def parts_of(storage: Storage, folder: str) -> list[CandidatesPart]:
    """The files of a folder, <partition>-<number>.parquet, by partition."""
    by_partition: dict[str, list[str]] = {}
    for info in sorted(storage.list(folder), key=lambda info: info.path):
        partition = info.path.rsplit("/", 1)[-1].rsplit("-", 1)[0]
        by_partition.setdefault(partition, []).append(info.path)
    return [CandidatesPart(partition, tuple(paths)) for partition, paths in by_partition.items()]


def describe_part(storage: Storage, part: CandidatesPart) -> tuple[str, pa.Schema]:
    """A digest of a part's files, and their columns (a Ray task)."""
    digest, schemas = hashlib.sha256(), []
    for path in part.paths:
        digest.update(storage.sha256(path).encode())
        with open_small(storage, path) as file:
            schemas.append(file.schema_arrow.remove_metadata())
    return digest.hexdigest(), pa.unify_schemas(schemas, promote_options="permissive")


def write_candidates_part(
    storage: Storage, output: Storage, folder: str, schema: pa.Schema, index: int, part: CandidatesPart
) -> FileEntry:
    """One data file of a version from one part (a Ray task)."""
    tables = (table.cast(schema) for path in part.paths for table in read_row_groups(storage, path))
    entry = write_part(output, folder, index, schema, tables)
    return entry.model_copy(update={"partition": part.partition})
