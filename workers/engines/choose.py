"""Which engine scores a policy."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from typing import TYPE_CHECKING

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.models.weights import check_weights
from grape_service.score.store import engine_version
from workers.engines.base import Engine
from workers.engines.sampler import Sampler
from workers.engines.transformers.arguments import engine_args

if TYPE_CHECKING:
    from grape_service.config.schema import Config

ENGINE_CLASS = "GRAPE_ENGINE_CLASS"
"""Environment variable that names another engine class, 'module:Class': for benchmarks and drills."""

log = logging.getLogger(__name__)


def engine_name(policy: PolicyConfig, folder: str) -> str:
    """vllm | transformers; auto takes vllm where it is importable and runs the model."""
    if policy.engine != "auto":
        return policy.engine
    from workers.engines.vllm.available import vllm_available_for

    available, reason = vllm_available_for(folder)
    if not available:
        log.info("scoring %s with transformers: %s", policy.model, reason)
    return "vllm" if available else "transformers"


def imports_transformers(policy: PolicyConfig) -> bool:
    """Whether a process that scores this policy is sure to load it with transformers, and nothing else."""
    is_auto = policy.engine == "auto" and importlib.util.find_spec("vllm") is None
    return (policy.engine == "transformers" or is_auto) and not os.environ.get(ENGINE_CLASS)


def refuse_missing_engines(config: Config) -> None:
    """Raises UserError where a policy is to be scored with an engine that this machine lacks, or with settings that its
    engine lacks, and on this machine."""
    if config.workers.ray_address != "auto" or os.environ.get(ENGINE_CLASS):
        return
    for policy in config.policies():
        if policy.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError(
                f"engine: vllm of {policy.model} is not installed here: install grape-service with its extra vllm, or "
                "say engine: transformers"
            )
        if policy.engine == "transformers":  # auto is decided where it is scored: a head may lack what its nodes have
            engine_args(policy)


def load_engine(policy: PolicyConfig, folder: str, for_few_rows: bool = False) -> Engine:
    """The policy's engine on this process's device; `policy.adapter` is a local folder.

    `for_few_rows`: it is tried out on no more than two before it is used.
    Raises UserError where the files are not the whole model, or more than that.
    """
    if given := os.environ.get(ENGINE_CLASS):
        module, _, name = given.partition(":")
        engine: Engine = getattr(importlib.import_module(module), name)(policy, folder)
        return engine
    is_wrapped = bool(check_weights(folder, policy).renames)
    if engine_name(policy, folder) == "vllm":
        from workers.engines.vllm.engine import VllmEngine

        vllm: Engine = VllmEngine(policy, folder, is_wrapped=is_wrapped)
        return vllm
    from workers.engines.transformers.engine import PROBE_ROWS, TransformersEngine

    return TransformersEngine(policy, folder, is_wrapped=is_wrapped, probe_rows=2 if for_few_rows else PROBE_ROWS)


SAMPLER_CLASS = "GRAPE_SAMPLER_CLASS"
"""Environment variable that names another sampler class, 'module:Class': for benchmarks and drills."""


def load_sampler(policy: PolicyConfig, folder: str) -> Sampler:
    """What samples for a policy on this process's device; `policy.adapter` is a local folder. Raises UserError."""
    if given := os.environ.get(SAMPLER_CLASS):
        module, _, name = given.partition(":")
        drill: Sampler = getattr(importlib.import_module(module), name)(policy, folder)
        return drill
    is_wrapped = bool(check_weights(folder, policy).renames)
    if engine_name(policy, folder) == "vllm":
        from workers.engines.vllm.sampler import VllmSampler

        vllm: Sampler = VllmSampler(policy, folder, is_wrapped)
        return vllm
    from workers.engines.transformers.sampler import TransformersSampler

    return TransformersSampler(policy, folder, is_wrapped)


def installed_version(policy: PolicyConfig, folder: str, scores_here: bool) -> str | None:
    """The engine that scores a policy, with its version and torch's, as score files have it.

    None where this machine cannot tell: without `scores_here`, others score, and may have an engine that it lacks.
    """
    name = engine_name(policy, folder)
    if name != policy.engine and not scores_here:
        return None
    try:
        library, torch = importlib.import_module(name), importlib.import_module("torch")
    except ImportError:
        return None
    made_by = {"engine": name, "version": library.__version__, "extra": {"torch": torch.__version__}}
    return engine_version(made_by)
