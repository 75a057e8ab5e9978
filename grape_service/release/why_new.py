"""Why a run's rows are a version of their own: what changed since the version before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grape_service.errors import UserError
from grape_service.keys import RELEASE_WITHOUT
from grape_service.release.catalog import read_catalog
from grape_service.release.manifest import Manifest, ManifestFields, Parents, read_manifest, without_secrets
from grape_service.storage.storage import Storage

NAMED_BY_USERS = ("behavior.sources", "gather.policies", "pool.columns", "render.template_kwargs", "target.engine_args")
MAX_NAMED = 4
"""Changes of a kind that are named."""


def why_new(storage: Storage, name: str, fields: ManifestFields, force: bool) -> str | None:
    """A sentence, without the version's own number: what changed since the newest version; None where there is none."""
    known = read_catalog(storage, name)
    if not known:
        return None
    try:
        old = read_manifest(storage, name, known[-1].version)
    except UserError:
        return None
    if old.content_digest == fields.content_digest:
        return f"its rows are those of {old.version}, which is not given again as {'--force' if force else 'it'} asks"
    changed = list(what_changed(old, fields))
    if not changed:
        return (
            f"its config, pool, models, code and libraries are those of {old.version}, and its rows differ: their "
            "scores were made again"
        )
    return f"what changed since {old.version}: {'; '.join(changed)}"


def what_changed(old: Manifest, new: ManifestFields) -> Iterator[str]:
    """Each kind of thing that a release is made of and that changed, in words."""
    before, after = dict(_leaves(old.config)), dict(_leaves(without_secrets(new.config)))
    keys = [key for key in before.keys() & after.keys() if before[key] != after[key]]
    keys += [*_came(before, after), *_came(after, before)]
    if keys := sorted({key for key in keys if _decides(key)}):
        yield f"{_some(keys)} of the config"
    if _pool(old.parents) != _pool(new.parents):
        yield "the pool's files"
    models = [_models(parents) for parents in (old.parents, new.parents)]
    if any(models[0][policy] != models[1][policy] for policy in models[0].keys() & models[1].keys()):
        yield "the models' files"
    if old.parents.release != new.parents.release:
        yield "the release whose rows are weighed"
    versions = [_versions(parents) for parents in (old.parents, new.parents)]
    names = sorted(name for name in {*versions[0], *versions[1]} if versions[0].get(name) != versions[1].get(name))
    if names:
        yield _some([f"{name} {versions[0].get(name, 'none')} -> {versions[1].get(name, 'none')}" for name in names])


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _leaves(one, (*path, str(key)))
    else:
        yield ".".join(path), list(value) if isinstance(value, tuple) else value


def _came(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Sections that only `after` has, and names in the sections whose names are the user's: other keys that only one
    config has are those of a newer version of the service."""
    for key in after.keys() - before.keys():
        parts = key.split(".")
        for length in range(1, len(parts)):
            section = ".".join(parts[:length])
            if section in before:  # null, or without a key
                yield section
            elif section in NAMED_BY_USERS and any(other.startswith(f"{section}.") for other in before):
                yield ".".join(parts[: length + 1])


def _decides(key: str) -> bool:
    return not any(key == path or key.startswith(f"{path}.") for path in RELEASE_WITHOUT)


def _pool(parents: Parents) -> list[Any]:
    first = [(file.path, file.size, file.digest or file.etag) for file in parents.pool]
    return [*first, parents.all_files.get("pool")]


def _models(parents: Parents) -> dict[Any, set[Any]]:
    """What is known of the files of each model, by its role and its name; the config says which came and went."""
    found: dict[Any, set[Any]] = {}
    for use in parents.policies:
        files = use.revision, use.weights_digest, use.tokenizer_digest, use.template_digest
        found.setdefault((use.role, use.model, use.adapter), set()).add(files)
    return found


def _versions(parents: Parents) -> dict[str, str]:
    code = parents.code
    own = {} if code is None else {"grape-service": f"{code.package_version} {(code.git_commit or '')[:8]}".strip()}
    return {**parents.libraries, **own}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"
