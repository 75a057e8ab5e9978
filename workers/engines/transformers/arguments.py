"""What of a policy's settings is the transformers engine's, known without torch."""

from __future__ import annotations

from typing import Any

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError

ENGINE_ARGS = ("max_batch_tokens", "logits_chunk_rows", "device")


def engine_args(policy: PolicyConfig) -> dict[str, Any]:
    """The policy's engine_args that are this engine's. Raises UserError for what this engine cannot do."""
    if policy.quantization is not None:
        raise UserError(f"quantization: {policy.quantization} needs engine: vllm; the transformers engine has none")
    if policy.tensor_parallel > 1:
        raise UserError("tensor_parallel needs engine: vllm; the transformers engine takes one device")
    unknown = unknown_args(policy)
    if unknown and policy.engine == "transformers":
        raise UserError(f"engine_args has no '{unknown[0]}' for transformers: it takes {', '.join(ENGINE_ARGS)}")
    return {name: value for name, value in policy.engine_args.items() if name in ENGINE_ARGS}


def unknown_args(policy: PolicyConfig) -> list[str]:
    """Names in engine_args that mean nothing to this engine."""
    return sorted(set(policy.engine_args) - set(ENGINE_ARGS))
