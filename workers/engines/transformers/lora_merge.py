"""A LoRA adapter added to the weights while they are loaded, so that scoring with it costs nothing.

W' = W + scale * B A in float32, rounded once to W's type; scale is alpha / r, or alpha / sqrt(r) for rsLoRA.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grape_service.errors import UserError

PREFIXES = ("", "transformer.", "model.", "model.decoder.", "model.model.")
"""What a checkpoint may leave out of the names that its model class gives the same weights."""


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA folder as changes to named weights."""

    folder: str
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # weight name -> A [r, in], B [out, r], scale
    replaced: dict[str, torch.Tensor]  # weight name -> the weight that the adapter brings whole
    transposed: bool  # weights are [in, out], as GPT-2 keeps them

    @property
    def rank(self) -> int:
        """The largest rank of its matrices."""
        return max((a.shape[0] for a, _, _ in self.pairs.values()), default=1)

    def merged(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's (name, weight) pairs with the adapter in them.

        Raises UserError at the end if part of the adapter met no weight: it would have been left out.
        """
        left = set(self.pairs) | set(self.replaced)
        for name, weight in weights:
            for known in (prefix + name for prefix in PREFIXES):
                if known in self.replaced:
                    left.discard(known)
                    weight = self.replaced[known].to(weight.dtype)
                elif known in self.pairs:
                    left.discard(known)
                    weight = self._with_delta(weight, *self.pairs[known])
            yield name, weight
        if left:
            raise UserError(
                f"the adapter {self.folder} changes {sorted(left)[0]}, which the model's files do not have: "
                "give the base model that it was trained on, or use engine: transformers"
            )

    def _with_delta(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        delta = scale * (b.float() @ a.float())
        if self.transposed:
            delta = delta.T
        return (weight.float() + delta.to(weight.device)).to(weight.dtype)


def load_adapter(folder: str) -> LoraAdapter:
    """Read a LoRA folder as PEFT writes it. Raises UserError for what cannot be added to the weights."""
    from safetensors.torch import load_file

    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors = load_file(str(Path(folder) / "adapter_model.safetensors"))
    except FileNotFoundError as error:
        raise UserError(
            f"the adapter folder {folder} has no {Path(error.filename or 'adapter_model.safetensors').name}: "
            "give a folder that PEFT saved, with adapter_config.json and adapter_model.safetensors"
        ) from None
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise UserError(f"the adapter {folder} is no plain LoRA: use engine: transformers for it")
    halves: dict[str, dict[str, torch.Tensor]] = {}
    replaced: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        match = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        if match:
            halves.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in name:
            raise UserError(
                f"the adapter {folder} holds {key}, which is not a pair of LoRA matrices: use engine: transformers"
            )
        else:
            replaced[name.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = tensor
    return LoraAdapter(
        folder=folder,
        pairs={
            f"{module}.weight": (half["A"], half["B"], _scale(config, module, half["A"].shape[0]))
            for module, half in halves.items()
        },
        replaced=replaced,
        transposed=bool(config.get("fan_in_fan_out")),
    )


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r of one module; alpha_pattern holds regular expressions of module names that differ."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
