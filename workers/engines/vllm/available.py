"""Whether vLLM is here, runs a model and is a version that was checked."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from grape_service.errors import UserError

CHECKED = ("0.26.0", "0.32.0")
"""First and last version whose source has what the engine uses; tests/workers/engines/vllm_names.py reads it."""


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


def version_sentence(version: str) -> str:
    """Which version is there and which were checked."""
    here = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    first, last = (tuple(int(part) for part in one.split(".")) for one in CHECKED)
    if first <= here <= last:
        return f"vLLM {version}, one of the versions {CHECKED[0]} to {CHECKED[1]} that were checked"
    return (
        f"vLLM {version} was not checked: {CHECKED[0]} to {CHECKED[1]} were; if its scoring head does not start, "
        "scores are made through prompt_logprobs"
    )
