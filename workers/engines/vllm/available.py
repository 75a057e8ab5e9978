"""Whether vLLM is here and runs a model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from grape_service.errors import UserError


def vllm_available_for(folder: str) -> tuple[bool, str]:
    """Whether vLLM can be imported and has the architecture of the model in `folder`, and if not, why.

    Starts no engine; importing vLLM's registry takes some seconds the first time.
    """
    if find_spec("vllm") is None:
        return False, "vLLM is not installed"
    try:
        from vllm.model_executor.models.registry import ModelRegistry
    except Exception as error:  # an install that does not fit its torch raises anything, and another engine can go on
        return False, f"vLLM cannot be imported: {error}"
    architecture = model_architecture(folder)
    if architecture not in ModelRegistry.get_supported_archs():
        return False, f"this vLLM has no {architecture}"
    return True, ""


def model_architecture(folder: str) -> str:
    """The first of `architectures` in the model's config.json. Raises UserError if there is none."""
    path = Path(folder) / "config.json"
    try:
        architectures = json.loads(path.read_text()).get("architectures")
    except FileNotFoundError:
        raise UserError(f"the model folder {folder} has no config.json: give a folder saved by transformers") from None
    if not architectures:
        raise UserError(f"{path} names no architectures: add the model's class, such as LlamaForCausalLM")
    return str(architectures[0])
