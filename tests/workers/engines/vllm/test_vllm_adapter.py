"""LoRA: merged while the weights load, equal to PEFT; what cannot be merged is refused, not left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grape_service.errors import UserError
from workers.engines.transformers.lora_merge import load_adapter

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

from tests.workers.engines.vllm.reference import assert_exact, engine_of, load_reference, random_ids, row, tiny_model

pytestmark = pytest.mark.vllm


def make_adapter(base: str, folder: Path, **settings: Any) -> str:
    """A LoRA whose B matrices are random too, so that it changes the model a lot."""
    import peft

    model = peft.get_peft_model(load_reference(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return str(folder)


SETTINGS = {
    "llama": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "qwen2": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear", "modules_to_save": ["norm"]},
    "gpt2": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"]},
}


@pytest.mark.parametrize("arch", sorted(SETTINGS))
def test_an_adapter_is_part_of_the_policy(tmp_path: Path, arch: str) -> None:
    folder = tiny_model(tmp_path / "base", arch)
    adapter = make_adapter(folder, tmp_path / "adapter", **SETTINGS[arch])
    rows = [row(random_ids(1, 40), random_ids(2 + n, 30)) for n in range(3)]
    with engine_of(folder, adapter=adapter) as engine:
        assert_exact(engine, load_reference(folder, adapter), rows)
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            assert_exact(engine, load_reference(folder), rows)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "base", "gpt2")
    adapter = make_adapter(tiny_model(tmp_path / "other"), tmp_path / "adapter", **SETTINGS["llama"])
    with (
        pytest.raises(UserError, match=r"changes model\.layers\.\d.*, which the model's files do not have"),
        engine_of(folder, adapter=adapter),
    ):
        pass


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "base")
    dora = make_adapter(folder, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(UserError, match="no plain LoRA"):
        load_adapter(dora)
    biased = make_adapter(folder, tmp_path / "biased", target_modules=["q_proj"])
    file = Path(biased) / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name.replace("lora_A", "lora_X"): tensors[name].clone()}, file)
    with pytest.raises(UserError, match="not a pair of LoRA matrices"):
        load_adapter(biased)
    (Path(biased) / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        load_adapter(biased)


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "base")
    adapter = load_adapter(make_adapter(folder, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj"]))
    weights = {name: value.bfloat16() for name, value in load_file(Path(folder) / "model.safetensors").items()}
    merged = dict(adapter.merged(weights.items()))
    assert merged.keys() == weights.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b, scale = adapter.pairs[name]
    assert scale == 2.0
    expected = (weights[name].double() + 2.0 * b.double() @ a.double()).bfloat16()
    assert torch.equal(merged[name], expected)
    assert torch.equal(merged["lm_head.weight"], weights["lm_head.weight"])
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == adapter.rank == 4
