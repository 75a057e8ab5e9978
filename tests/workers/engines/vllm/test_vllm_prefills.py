"""Rows whose prompt ends with a prefill, candidates of one prompt that share it up to there: exact as all others."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from grape_service.config.schema import RenderConfig
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rendered

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

from tests.workers.engines.vllm.reference import Row, assert_exact, engine_of, load_reference, tiny_model

pytestmark = pytest.mark.vllm


def test_responses_behind_a_prefill_are_exact(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    renderer = Renderer(AutoTokenizer.from_pretrained(folder), RenderConfig())
    question = {"role": "user", "content": "What is the capital of France, and how many people live there?"}
    rows: list[Row] = []
    for prefill in ("The ans", "The answer is ", "x"):
        prompt = [question, {"role": "assistant", "content": prefill}]
        answers = ("wer is Paris.", "Paris.", "wer is Paris, of course: two million.", "w")
        for found in renderer.render([Candidate(prompt, answer, "p", "c") for answer in answers]):
            assert isinstance(found, Rendered)
            rows.append((found.input_ids.tolist(), (found.loss_mask > 0).tolist()))
    with engine_of(folder, max_batch_tokens=48) as engine:
        assert engine.description.path == "head"
        assert_exact(engine, load_reference(folder), rows)
