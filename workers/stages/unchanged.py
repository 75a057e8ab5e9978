"""A run that has nothing to do: what was released before from the very same things is found without any task.

    released/<name>/<key>.json      in the workspace: a version, and the counts of the run that made it

The key is made in grape_service/keys.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import orjson

from grape_service import keys
from grape_service.checks.evaluation_sets import evaluation_items
from grape_service.config.checks import Contamination
from grape_service.config.schema import Config
from grape_service.models.files import texts_of
from grape_service.pool.files import PoolFile
from grape_service.prepare.plan import files_key, pool_listing
from grape_service.prepare.result import Prepared
from grape_service.release.manifest import read_manifest
from grape_service.release.writer import is_whole
from workers.outcome import Outcome, release_outcome
from workers.run import Run
from workers.stages.release import point_tags

REMEMBERED = ("prompts", "rows", "rejected", "reused", "counts")
"""Fields of an outcome that the next run with the same key repeats."""


def release_key(run: Run) -> str | None:
    """Names everything that decides what a run releases: no tokenizer is loaded for it, and no pool file read twice.

    None where rows are chosen, weighed or judged by a function of the user's, whose code may have changed.
    """
    config = run.config
    if config.names_own_methods or config.has_own_judge:
        return None
    listing = pool_listing(config, run.workspace)
    policies = config.policies()
    contaminations = [one for one in config.checks.enabled() if isinstance(one, Contamination)]
    made_of = {
        "output": run.output.root,
        "files": files_key(listing.files),
        "passed_over": sorted(listing.passed_over),
        "policies": [run.policy_id(policy) for policy in policies],
        "texts": [texts_of(run.files_of(policy)) for policy in policies],
        "evaluation": [_digest_of_items(run, one.files) for one in contaminations],
    }
    return keys.release_key(config, made_of)


def unchanged_release(run: Run, key: str) -> Outcome | None:
    """The version that a run with the same pool, policies, settings and code released, with the tags moved to it."""
    found = run.workspace.read_note(_path(run, key), "version", "content_digest", *REMEMBERED)
    if found is None:
        return None
    version = found["version"]
    if not is_whole(run.output, run.name, version, found["content_digest"]):  # deleted, or filled again since then
        return None
    run.event(f"the pool, models and settings are those of {version}: nothing is left to do")
    point_tags(run, version)
    return release_outcome(run, version, is_new=False, **{name: found[name] for name in REMEMBERED})


def remember_release(run: Run, key: str, asked: Config, prepared: Prepared, outcome: Outcome) -> None:
    """Have the next run find what this one released, unless the pool or a model changed after `key` was made of
    `asked`, the run's config before its pool was gathered.

    Rows that failed are tried again by the next run, so nothing is remembered where there are some.
    """
    planned = [PoolFile(**values) for values in run.workspace.read_json(f"{prepared.folder}/plan.json")["files"]]
    listed = pool_listing(run.config, run.workspace).files
    if outcome.version is None or outcome.failed or files_key(planned) != files_key(listed):
        return
    if release_key(replace(run, config=asked)) != key:
        return
    value = {
        **{name: getattr(outcome, name) for name in REMEMBERED},
        "reused": outcome.scored + outcome.reused,
        "version": outcome.version,
        "content_digest": read_manifest(run.output, run.name, outcome.version).content_digest,
    }
    run.workspace.write_json(_path(run, key), value)


def _path(run: Run, key: str) -> str:
    return f"released/{run.name}/{key}.json"


def _digest_of_items(run: Run, files: list[str]) -> str:
    digest = hashlib.sha256()
    for text in evaluation_items(files, run.config.storage):
        digest.update(orjson.dumps(text))
    return digest.hexdigest()
