"""The transformers engine starts only with a causal language model whose weights are the files'."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.rows.ragged import TokenBatch
from tests.tiny_models import make_model
from workers.engines.choose import load_engine

BATCH = TokenBatch.from_rows([([5, 6, 7, 8, 9], [False, False, True, True, True])])


def policy(folder: str) -> PolicyConfig:
    return PolicyConfig(model=folder, engine="transformers", dtype="float32")


def test_wrapped_names_give_the_scores_of_the_model_itself(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    expected = load_engine(policy(folder), folder).score(BATCH)
    file = Path(folder, "model.safetensors")
    state = load_file(file)
    save_file({f"module._orig_mod.{name}": weight for name, weight in state.items()}, file, metadata={"format": "pt"})
    assert np.array_equal(load_engine(policy(folder), folder).score(BATCH), expected)
    del state["lm_head.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its files lack lm_head\.weight"):
        load_engine(policy(folder), folder)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    file = Path(folder, "model.safetensors")
    state = load_file(file)
    state["model.norm.weight"][3] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values that are not finite"):
        load_engine(policy(folder), folder)
    state["model.norm.weight"][:] = 3e38  # finite, but nothing that is made of it is
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="its logits are not finite"):
        load_engine(policy(folder), folder)


def test_a_model_in_which_later_tokens_change_earlier_ones_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=False,
    )
    BertLMHeadModel(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertLMHeadModel"]
    with pytest.raises(UserError, match="is no causal language model"):
        load_engine(policy(str(folder)), str(folder))
