"""A run that has nothing to do: what was released before from the very same things is found without any task.

    released/<name>/<key>.json      in the workspace: a version, and the counts of the run that made it

The key is a digest of everything that decides a release: prepared pool, policies, settings, evaluation sets, code.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from grape_service.checks.evaluation_sets import evaluation_items
from grape_service.config.checks import Contamination
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.prepare.result import Prepared
from grape_service.release.manifest import read_manifest
from workers.outcome import Outcome, release_outcome
from workers.provenance import library_versions
from workers.run import Run
from workers.stages.release import point_tags

FORMAT = 1
WITHOUT_EFFECT = {"workers", "notify", "train", "storage"}
"""Sections of a config that do not change what a release holds."""


def unchanged_release(run: Run, prepared: Prepared) -> Outcome | None:
    """The version that a run with the same pool, policies, settings and code released, with the tags moved to it."""
    if has_own_method(run.config):
        return None
    try:
        found = run.workspace.read_json(_path(run, prepared))
    except FileNotFoundError:
        return None
    version = found["version"]
    if _content_digest(run, version) != found["content_digest"]:  # deleted, or of a folder that was made anew
        return None
    run.event(f"release: pool, models and settings are those of {version}, nothing is left to do")
    point_tags(run, version)
    counts = {key: found[key] for key in ("prompts", "rows", "reused", "counts")}
    return release_outcome(run, version, is_new=False, rejected=prepared.rejects.total, **counts)


def remember_release(run: Run, prepared: Prepared, outcome: Outcome) -> None:
    """Have the next run find what this one released; rows that failed are tried again, so those runs are not kept."""
    if outcome.failed == 0 and not has_own_method(run.config) and outcome.version is not None:
        value = {
            "version": outcome.version,
            "content_digest": _content_digest(run, outcome.version),
            "prompts": outcome.prompts,
            "rows": outcome.rows,
            "reused": outcome.scored + outcome.reused,
            "counts": outcome.counts,
        }
        run.workspace.write_json(_path(run, prepared), value)


def has_own_method(config: Config) -> bool:
    """Whether rows are chosen or weighed by a function of the user's, whose code may have changed."""
    sections = [section for section in (config.select, config.weights) if section is not None]
    named = any(":" in section.method and not section.method.startswith("source:") for section in sections)
    return named or any(getattr(section, "own", None) is not None for section in sections)


def _content_digest(run: Run, version: str) -> str | None:
    try:
        return read_manifest(run.output, run.name, version).content_digest
    except (FileNotFoundError, UserError):
        return None


def _path(run: Run, prepared: Prepared) -> str:
    config = run.config
    settings = config.model_dump(mode="json", exclude=WITHOUT_EFFECT | {"output"})
    policies = [config.target, *(config.behavior.policies() if config.behavior is not None else ())]
    decides: dict[str, Any] = {
        "format": FORMAT,
        "code": _code_digest(),
        "libraries": library_versions(),
        "output": run.output.root,
        "settings": settings,
        "pool": prepared.prepare_id,
        "policies": [run.policy_id(policy) for policy in policies],
        "evaluation": [
            _digest_of_items(run, one.files) for one in config.checks.enabled() if isinstance(one, Contamination)
        ],
    }
    digest = hashlib.sha256(orjson.dumps(decides, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return f"released/{run.name}/{digest[:32]}.json"


def _digest_of_items(run: Run, files: list[str]) -> str:
    digest = hashlib.sha256()
    for text in evaluation_items(files, run.config.storage):
        digest.update(orjson.dumps(text))
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    """sha256 of this package's own files: other code may release other rows."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("grape_service", "workers"):
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(orjson.dumps([str(path.relative_to(root)), content]))
    return digest.hexdigest()
