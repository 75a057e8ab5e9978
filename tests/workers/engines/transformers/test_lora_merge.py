"""The scale of a LoRA adapter by hand: alpha / r, for rsLoRA alpha / sqrt(r)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from workers.engines.transformers.lora_merge import load_adapter


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"use_rslora": False}, 2.0), ({"alpha_pattern": {"q_proj": 4}}, 1.0)],
)
def test_the_scale_of_an_adapter(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    a, b = torch.eye(4, 6), torch.ones(5, 4)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"], **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weight = torch.zeros(5, 6)
    [(_, merged)] = load_adapter(str(tmp_path)).merged([("model.layers.0.self_attn.q_proj.weight", weight)])
    assert torch.equal(merged, scale * (b @ a))
