"""A causal language model from a local folder, in two parts: tokens to hidden states, hidden states to logits."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.models.headers import file_headers
from grape_service.models.weights import WRAPPERS, quiet_transformers
from grape_service.rows.ragged import Int64s

UNWRAP = {rf"(^|\.)(?:(?:{'|'.join(sorted(WRAPPERS))})\.)+": r"\1"}
"""Takes the parts that wrappers put into names out of them while transformers loads."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""The first two are of scoring alone."""


def device_of(args: dict[str, Any]) -> torch.device:
    """The device that engine_args name, else the GPU, else the CPU."""
    return torch.device(args.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_model(policy: PolicyConfig, folder: str, device: torch.device, is_wrapped: bool = False) -> PreTrainedModel:
    """The policy's model in eval mode on `device`, its adapter put in.

    `is_wrapped`: what wrappers put into the names of weights is taken out.

    Raises UserError if it cannot be loaded, or is not all that the files hold.
    """
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[policy.dtype],
                trust_remote_code=policy.trust_remote_code,
                local_files_only=True,
                use_safetensors=None if policy.allow_pickle else True,
                key_mapping=UNWRAP if is_wrapped else None,
                output_loading_info=True,
            )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model '{policy.model}' cannot be loaded by transformers: {reason}") from error
    model, info = loaded
    _refuse_other_weights(info, policy)
    _refuse_not_finite(model, policy)
    if policy.adapter is not None:
        model = _with_adapter(model, policy.adapter, policy.dtype)
    return model.to(device).eval().requires_grad_(False)


def _refuse_other_weights(info: dict[str, Any], policy: PolicyConfig) -> None:
    """Nothing is scored with weights that were drawn at random: what the files' headers promised has to have come."""
    for key, what in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "hold besides"),
        ("mismatched_keys", "disagree on"),
    ):
        names = sorted(str(name) for name in info[key])
        if names:
            raise UserError(f"model '{policy.model}': its files {what} {names[0]}, so that they are not this model's")


def _refuse_not_finite(model: torch.nn.Module, policy: PolicyConfig) -> None:
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))):
            continue  # one value that is not finite makes the sum such a one
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"model '{policy.model}': {name} holds values that are not finite (NaN or infinity)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the device or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "not enough memory" in text or "can't allocate memory" in text or "out of memory" in text


def _with_adapter(model: Any, adapter: str, dtype: str) -> Any:
    """The model with its LoRA layers put in; in float32 they are merged, elsewhere that would round the weights."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    except ImportError:
        raise UserError(f"adapter '{adapter}' needs the package peft: pip install peft") from None
    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning:
        raise UserError(f"adapter '{adapter}' is a {config.peft_type} adapter: only LoRA folders are scored")
    adapted = PeftModel.from_pretrained(model, adapter)
    file = Path(adapter, "adapter_model.safetensors")
    stored = set(file_headers(file)) if file.is_file() else set()
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    for names, what in ((wanted - stored, "lacks"), (stored - wanted - set(adapted.state_dict()), "holds besides")):
        if names and stored:
            raise UserError(
                f"adapter '{adapter}' {what} {min(names)}: give the adapter of this base model, with its own "
                "adapter_config.json"
            )
    return adapted.merge_and_unload() if dtype == "float32" else adapted.get_base_model()


class HiddenStates(torch.nn.Module):
    """Stands in for a base model: called with hidden states, it answers with them; else it is the base model.

    The base model's own modules are stood in for too, for models that call one of those instead.
    """

    def __init__(self, real: torch.nn.Module):
        super().__init__()
        self._real = (real,)  # not a submodule

    def forward(self, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if inputs_embeds is None:
            return self._real[0](*args, **kwargs)
        return _Output(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_real"][0], name)
        return HiddenStates(value) if isinstance(value, torch.nn.Module) else value


class _Output(SimpleNamespace):
    """A base model's output: last_hidden_state, and None for whatever else is asked."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Any:
        return self.last_hidden_state if index == 0 else None


class CausalModel:
    """Tokens to hidden states by the base model; hidden states to logits by the model's own forward.

    The second part is the causal model itself with a stand-in for its base model, so that soft caps, scales and
    whatever else it does after the base model are its own code. No weights are copied.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        base_name = next((name for name in (model.base_model_prefix, "model") if name in model._modules), None)
        if base_name is None:
            raise UserError(f"{type(model).__name__} has no base model that transformers names: use engine: vllm")
        self.base: Any = model.get_submodule(base_name)
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, base_name: HiddenStates(self.base)}

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids [B, T] -> [B, T, hidden size]."""
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.base(input_ids=input_ids, use_cache=False, **positions).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, hidden size] -> logits [N, vocabulary]."""
        return self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def close(self) -> None:
        """Let go of the weights."""
        del self.model, self.base, self._head


class LengthDependentRope:
    """Rotary embeddings whose frequencies depend on the longest sequence of a forward pass (longrope, dynamic).

    Rows may only be computed together where each alone would get the same frequencies.
    """

    def __init__(self, base: torch.nn.Module):
        self._dynamic: list[Any] = []
        self._limits: dict[str, int] = {}
        module: Any
        for module in base.modules():
            types = getattr(module, "rope_type", None)
            for rope_type in set(types.values()) if isinstance(types, dict) else {types}:
                if rope_type == "longrope":
                    self._limits[rope_type] = _original_max_position(module.config)
                elif isinstance(rope_type, str) and "dynamic" in rope_type:
                    self._limits[rope_type] = int(module.original_max_seq_len)
                    self._dynamic.append(module)

    def kinds(self, lengths: Int64s) -> Int64s:
        """A number for each row [N]; rows with the same number get the same frequencies."""
        kinds = np.zeros(len(lengths), dtype=np.int64)
        for rope_type, limit in self._limits.items():
            kinds = np.maximum(kinds, np.where(lengths > limit, 1 if rope_type == "longrope" else lengths, 0))
        return kinds

    def reset(self) -> None:
        """Make the next forward pass work out its frequencies from its own length, whatever came before it."""
        for module in self._dynamic:
            module.max_seq_len_cached = 0


def _original_max_position(config: Any) -> int:
    parameters = config.rope_parameters
    if "original_max_position_embeddings" not in parameters:  # by layer type
        parameters = next(p for p in parameters.values() if "original_max_position_embeddings" in p)
    return int(parameters["original_max_position_embeddings"])
