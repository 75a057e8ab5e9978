"""vLLM starts only with the model that the files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

from tests.workers.engines.vllm.reference import assert_exact, load_reference, random_ids, row, tiny_model
from workers.engines.choose import load_engine

pytestmark = pytest.mark.vllm

ROWS = [row(random_ids(1, length), random_ids(2, 20)) for length in (1, 33)]


def policy(folder: str, **over: Any) -> PolicyConfig:
    return PolicyConfig(model=folder, engine="vllm", dtype="float32", **over)


def test_wrapped_names_missing_and_infinite_weights(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    reference = load_reference(folder)
    file = Path(folder, "model.safetensors")
    state = load_file(file)

    def store(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, file, metadata={"format": "pt"})

    store({name: weight for name, weight in state.items() if name != "lm_head.weight"})
    with pytest.raises(UserError, match=r"its files lack lm_head\.weight"):
        load_engine(policy(folder), folder)
    store({**state, "model.norm.weight": state["model.norm.weight"] * float("inf")})
    with pytest.raises(UserError, match=r"model\.norm\.weight with values that are not finite"):
        load_engine(policy(folder), folder)
    store({f"_orig_mod.{name}": weight for name, weight in state.items()})
    with pytest.raises(UserError, match="save it unwrapped"):
        load_engine(policy(folder, engine_args={"scoring_head": False}), folder)
    engine = load_engine(policy(folder, engine_args={"max_batch_tokens": 256}), folder)
    try:
        assert_exact(engine, reference, ROWS)
    finally:
        engine.close()
