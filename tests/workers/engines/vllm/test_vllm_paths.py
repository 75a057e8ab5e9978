"""Which way a model is scored, what the engine refuses, and how it ends."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.rows.ragged import TokenBatch

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

from tests.workers.engines.vllm.reference import assert_exact, engine_of, load_reference, random_ids, row, tiny_model
from workers.engines.vllm import head
from workers.engines.vllm.available import vllm_available_for
from workers.engines.vllm.engine import VllmEngine

pytestmark = pytest.mark.vllm

ROWS = [row(random_ids(1, length), random_ids(2, 20)) for length in (1, 33, 70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("llama"))


def test_without_a_head_prompt_logprobs_and_one_line_that_says_so(
    folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="workers"), engine_of(folder, scoring_head=False) as engine:
        assert engine.description.path == "prompt_logprobs"
        assert engine.description.extra["why_not_head"] == "engine_args.scoring_head is off"
        assert_exact(engine, load_reference(folder), ROWS)
        with pytest.raises(UserError, match=r"cannot be scored at temperature 0\.5"):
            engine.score(TokenBatch.from_rows(ROWS), temperature=0.5)
    (line,) = [record.getMessage() for record in caplog.records if "prompt_logprobs" in record.getMessage()]
    assert "because engine_args.scoring_head is off" in line
    assert "0.6 times" in line


def test_a_head_that_does_not_start_is_no_reason_to_stop(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("vLLM has changed")

    monkeypatch.setattr(head.ScoringPooler, "__init__", broken)
    with engine_of(folder) as engine:
        assert engine.description.path == "prompt_logprobs"
        assert "vLLM has changed" in engine.description.extra["why_not_head"]
        assert_exact(engine, load_reference(folder), ROWS)


def test_which_models_vllm_is_for(folder: str, tmp_path: Path) -> None:
    assert vllm_available_for(folder) == (True, "")
    config = json.loads((Path(folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysForCausalLM"]}))
    assert vllm_available_for(str(tmp_path)) == (False, "this vLLM has no NobodysForCausalLM")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="names no architectures"):
        vllm_available_for(str(tmp_path))
    with pytest.raises(UserError, match=r"has no config\.json"):
        vllm_available_for(str(tmp_path / "nowhere"))


def test_why_a_model_has_no_head() -> None:
    assert head.why_no_head("LlamaForCausalLM") is None
    assert head.why_no_head("GPT2LMHeadModel") is None
    assert "not a causal language model" in str(head.why_no_head("BertModel"))
    assert "has no NobodysForCausalLM" in str(head.why_no_head("NobodysForCausalLM"))


def test_the_plugin_registers_every_causal_model_in_a_fresh_process() -> None:
    """As vLLM's worker processes do it: through the entry point, with none of our modules imported first."""
    code = (
        "import os; os.environ['VLLM_LOGGING_LEVEL'] = 'ERROR'\n"
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.model_executor.models.registry import ModelRegistry as R\n"
        "causal = {a for a in R.models if a.endswith(('ForCausalLM', 'LMHeadModel')) and 'GrapeScoring' not in a}\n"
        "assert len(causal) > 100 and all('GrapeScoring' + a in R.models for a in causal)\n"
        "cls = R.models['GrapeScoringLlamaForCausalLM'].load_model_cls()\n"
        "assert cls.__name__ == 'GrapeScoringLlamaForCausalLM' and cls.is_pooling_model\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_refuses_what_it_cannot_score_and_ends_cleanly(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(folder) as engine:
        with pytest.raises(UserError, match="a row of 513 tokens is longer than the 512 tokens"):
            engine.score(TokenBatch.from_rows([row(random_ids(1, 500), random_ids(1, 13))]))

        def fails(*_: object) -> None:
            raise ValueError("a bug in the step")

        monkeypatch.setattr(engine._core, "step", fails)
        with pytest.raises(ValueError, match="a bug in the step"):
            engine.score(TokenBatch.from_rows(ROWS))
        # What the failed step left in vLLM's cache is unknown: the engine is not used again.
        with pytest.raises(RuntimeError, match="the vLLM engine stopped: a bug in the step"):
            engine.score(TokenBatch.from_rows(ROWS))
    with pytest.raises(RuntimeError, match="stopped"):
        engine.score(TokenBatch.from_rows(ROWS))


def test_a_row_that_never_comes_whole_is_nan(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(folder) as engine:
        step = engine._core.step

        def with_a_hole() -> list[tuple[str, np.ndarray, int]]:
            return [(key, values[:-1] if len(values) == 7 else values, cached) for key, values, cached in step()]

        monkeypatch.setattr(engine._core, "step", with_a_hole)
        scores = engine.score(TokenBatch.from_rows([*ROWS, row(random_ids(3, 5), random_ids(3, 7))]))
        assert np.isnan(scores[-7:]).all()
        assert np.isfinite(scores[:-7]).all()
        assert engine.stats()["rescored_rows"] == 1


def test_a_model_that_cannot_start_says_why(folder: str, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "model")
    (broken / "model.safetensors").unlink()
    with pytest.raises(Exception, match=r"(?i)model weights|safetensors"):
        VllmEngine(PolicyConfig(model=str(broken), dtype="float32"), str(broken))
