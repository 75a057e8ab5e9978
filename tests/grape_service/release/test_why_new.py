"""Why a run's rows are a version of their own, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grape_service.release.manifest import ManifestFields
from grape_service.release.why_new import why_new
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows

pytestmark = pytest.mark.quick

CONFIG: dict[str, Any] = {
    "select": {"method": "grape", "seed": 0},
    "weights": None,
    "behavior": {"sources": {"a": {"model": "m"}}},
    "output": {"tags": ["latest"]},
    "workers": {"cpus": None},
}
PARENTS: dict[str, Any] = {
    "pool": [{"path": "p.jsonl", "size": 3, "digest": "d"}],
    "policies": [
        {"role": "target", "policy_id": "m-1", "model": "m", "weights_digest": "w"},
        {"role": "behavior", "policy_id": "b-1", "model": "b", "weights_digest": "v"},
    ],
    "libraries": {"pyarrow": "26.0.0", "torch": "2.13.0"},
    "code": {"package_version": "0.1.0", "git_commit": "abcdef0123"},
}


@pytest.mark.parametrize(
    ("config", "parents", "digest", "sentence"),
    [
        ({}, {}, "b", "its config, pool, models, code and libraries are those of v0001, and its rows differ: their"),
        ({}, {}, "a", "its rows are those of v0001, which is not given again as --force asks"),
        ({"select": {"method": "rsr", "seed": 1}}, {}, "b", "v0001: select.method, select.seed of the config"),
        ({"output": {"tags": []}, "workers": {"cpus": 2}, "later": 1}, {}, "b", "and its rows differ"),
        (
            {},
            {"pool": [{"path": "p.jsonl", "size": 3, "digest": "e"}]},
            "b",
            "what changed since v0001: the pool's files",
        ),
        (
            {},
            {"policies": [{"role": "target", "policy_id": "m-2", "model": "m", "weights_digest": "x"}]},
            "b",
            "what changed since v0001: the models' files",
        ),
        ({}, {"policies": PARENTS["policies"][:1]}, "b", "and its rows differ"),
        ({}, {"release": "o/x@v0001"}, "b", "v0001: the release whose rows are weighed"),
        ({"weights": {"method": "pear", "level": "token"}}, {}, "b", "v0001: weights of the config"),
        ({"behavior": None}, {}, "b", "v0001: behavior of the config"),
        ({"behavior": {"sources": {"a": {"model": "m"}, "b": "none"}}}, {}, "b", "v0001: behavior.sources.b of the"),
        ({"behavior": {"sources": {}}}, {}, "b", "v0001: behavior.sources of the config"),
        ({"behavior": {"sources": {"a": {"model": "m"}}, "later": 1}}, {}, "b", "and its rows differ"),
        ({}, {"libraries": {"pyarrow": "26.0.1"}}, "b", "v0001: pyarrow 26.0.0 -> 26.0.1, torch 2.13.0 -> none"),
        (
            {"select": {"method": "rsr", "seed": 0}},
            {"code": {"package_version": "0.2.0"}},
            "b",
            "v0001: select.method of the config; grape-service 0.1.0 abcdef01 -> 0.2.0",
        ),
    ],
)
def test_what_changed_is_said(
    tmp_path: Path, config: dict[str, Any], parents: dict[str, Any], digest: str, sentence: str
) -> None:
    storage = Storage(str(tmp_path))
    first = ManifestFields(content_digest="a" * 64, config=CONFIG, parents=PARENTS)
    assert why_new(storage, "math-sft", first, force=False) is None
    publish_version(storage, parts=[rows(0, 3)], digest="a" * 64, config=CONFIG, parents=PARENTS)
    fields = ManifestFields(content_digest=digest * 64, config={**CONFIG, **config}, parents={**PARENTS, **parents})
    assert sentence in str(why_new(storage, "math-sft", fields, force=digest == "a"))
