"""Which engine scores a policy."""

from __future__ import annotations

import importlib
import logging
import os

from grape_service.config.policy import PolicyConfig
from grape_service.models.weights import check_weights
from workers.engines.base import Engine

ENGINE_CLASS = "GRAPE_ENGINE_CLASS"
"""Environment variable that names another engine class, 'module:Class': for benchmarks and drills."""

log = logging.getLogger(__name__)


def engine_name(policy: PolicyConfig, folder: str) -> str:
    """vllm | transformers; auto takes vllm where it is importable and runs the model."""
    if policy.engine != "auto":
        return policy.engine
    from workers.engines.vllm.engine import vllm_available_for

    available, reason = vllm_available_for(folder)
    if not available:
        log.info("scoring %s with transformers: %s", policy.model, reason)
    return "vllm" if available else "transformers"


def load_engine(policy: PolicyConfig, folder: str) -> Engine:
    """The policy's engine on this process's device; `policy.adapter` is a local folder.

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
    from workers.engines.transformers.engine import TransformersEngine

    return TransformersEngine(policy, folder, is_wrapped=is_wrapped)
