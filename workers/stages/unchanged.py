"""A run that has nothing to do: what was released before from the very same things is found without any task.

    released/<name>/<key>.json      in the workspace: a version, and the counts of the run that made it

The key is a digest of everything that decides a release: pool files, models, settings, evaluation sets, code.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import orjson

from grape_service.checks.evaluation_sets import evaluation_items
from grape_service.config.checks import Contamination
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.models.files import text_digests
from grape_service.prepare.plan import pool_listing
from grape_service.prepare.result import Prepared
from grape_service.release.manifest import read_manifest
from workers.outcome import Outcome, release_outcome
from workers.provenance import library_versions
from workers.run import Run
from workers.stages.release import point_tags

FORMAT = 1
REMEMBERED = ("prompts", "rows", "rejected", "reused", "counts")
"""Fields of an outcome that the next run with the same key repeats."""
WITHOUT_EFFECT = {"workers", "notify", "train", "storage", "output", "workspace"}
"""Sections of a config that do not change what a release holds."""


def release_key(run: Run) -> str | None:
    """Names everything that decides what a run releases: no tokenizer is loaded for it, and no pool file read twice.

    None where rows are chosen or weighed by a function of the user's, whose code may have changed.
    """
    config = run.config
    if has_own_method(config):
        return None
    listing = pool_listing(config, run.workspace)
    policies = [config.target, *(config.behavior.policies() if config.behavior is not None else ())]
    contaminations = [one for one in config.checks.enabled() if isinstance(one, Contamination)]
    decides: dict[str, Any] = {
        "format": FORMAT,
        "code": _code_digest(),
        "libraries": library_versions(),
        "output": run.output.root,
        "settings": config.model_dump(mode="json", exclude=WITHOUT_EFFECT),
        "workers": [config.workers.shard_tokens, config.workers.partition_bytes],
        "files": _files_digest([asdict(file) for file in listing.files]),
        "passed_over": sorted(listing.passed_over),
        "policies": [run.policy_id(policy) for policy in policies],
        "texts": [text_digests(run.files_of(policy).folder) for policy in policies],
        "evaluation": [_digest_of_items(run, one.files) for one in contaminations],
    }
    return hashlib.sha256(orjson.dumps(decides, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def unchanged_release(run: Run, key: str) -> Outcome | None:
    """The version that a run with the same pool, policies, settings and code released, with the tags moved to it."""
    try:
        found = run.workspace.read_json(_path(run, key))
    except FileNotFoundError:
        return None
    version = found["version"]
    if _content_digest(run, version) != found["content_digest"]:  # deleted, or its folder was deleted and filled again
        return None
    run.event(f"the pool, models and settings are those of {version}: nothing is left to do")
    point_tags(run, version)
    return release_outcome(run, version, is_new=False, **{name: found[name] for name in REMEMBERED})


def remember_release(run: Run, key: str, prepared: Prepared, outcome: Outcome) -> None:
    """Have the next run find what this one released, unless the pool changed after `key` was made.

    Rows that failed are tried again by the next run, so nothing is remembered where there are some.
    """
    planned = run.workspace.read_json(f"{prepared.folder}/plan.json")["files"]
    listed = [asdict(file) for file in pool_listing(run.config, run.workspace).files]
    if outcome.version is None or outcome.failed or _files_digest(planned) != _files_digest(listed):
        return
    value = {
        **{name: getattr(outcome, name) for name in REMEMBERED},
        "reused": outcome.scored + outcome.reused,
        "version": outcome.version,
        "content_digest": _content_digest(run, outcome.version),
    }
    run.workspace.write_json(_path(run, key), value)


def _path(run: Run, key: str) -> str:
    return f"released/{run.name}/{key}.json"


def _files_digest(files: list[dict[str, Any]]) -> str:
    """A digest over pool files as they are listed or as plan.json has them."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(orjson.dumps([file["url"], file["size"], file["digest"] or file["version"]]))
    return digest.hexdigest()


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
