"""What init, check and plan say of a config that samples its candidates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.estimate.gathering import remember_rate
from grape_service.gather.samples import sampler_id
from grape_service.models.files import policy_id, resolve_model
from grape_service.render.loading import load_renderer
from grape_service.storage.storage import Storage
from tests import tiny_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make_model(tmp_path_factory.mktemp("model"))


def prompts(folder: Path) -> str:
    rows = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(8)]
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def invoke(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, UserError | SystemExit), done.exception
    return done.exit_code, f"{done.stdout}{done.exception or ''}"


def written(folder: Path, model: str, **gather: Any) -> Path:
    """The config that `init --gather` writes, with a tiny model, at small lengths."""
    code, text = invoke("init", prompts(folder / "sums"), "--model", model, "--gather", model, "--gather", model)
    assert code == 0, text
    values = yaml.safe_load(text)
    small = {"engine": "transformers", "dtype": "float32"}
    names = list(values["gather"]["policies"])
    assert values["gather"]["policies"] == {name: {"model": model, "samples": 4} for name in names}
    assert values["gather"]["verify"] == {"method": "math", "answer": "answer"}
    assert values["pool"]["columns"] == {"prompt": "question"}
    values["gather"]["policies"] = {names[0]: {"model": model, "samples": 3, **small}}
    values |= {"target": {"model": model, **small}, "output": {"path": str(folder / "out")}}
    values["gather"] |= {"sampling": {"max_tokens": 8}, **gather}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_plan_counts_samples_by_policy(tmp_path: Path, model: str) -> None:
    path = written(tmp_path, model)
    config = Config.model_validate(yaml.safe_load(path.read_text()))
    assert config.gather is not None
    (name,) = config.gather.policies
    code, text = invoke("plan", str(path))
    assert code != 0
    assert "nobody has sampled gather.policies" in text
    code, text = invoke("plan", str(path), "--tokens-per-second", "2", "--price", "3.6", "--json")
    assert code == 0, text
    made = orjson.loads(text)
    sampled, scored = made["policies"]
    assert (sampled["role"], sampled["rows"], sampled["tokens"]) == (f"gather {name}", 24, 24 * 8)
    assert "max_tokens of each, at the most" in made["counted"]
    assert (scored["role"], scored["rows"]) == ("target", 24)
    assert scored["tokens"] > sampled["tokens"]
    assert made["cost"] == pytest.approx((sampled["tokens"] + scored["tokens"]) / 2 * 3.6 / 3600)

    policy, workspace = config.gather.policy(name), Storage(config.workspace_path)
    files = resolve_model(policy, {})
    stop_ids = load_renderer(files.folder, policy, config.render).stop_ids
    sampler = sampler_id(policy_id(policy, files), config.gather.sampling_of(name), stop_ids)
    remember_rate(workspace, sampler, samples=10, tokens=50, seconds=5.0, device="cpu")
    made = orjson.loads(invoke("plan", str(path), "--device", "cpu", "--json")[1])
    assert (made["policies"][0]["tokens"], made["policies"][0]["tokens_per_second"]) == (24 * 5, 10.0)


def test_check_looks_at_who_samples_and_at_what_says_right(tmp_path: Path, model: str) -> None:
    path = written(tmp_path, model, verify={"method": "exact", "answer": "answer"})
    code, text = invoke("check", str(path), "--json")
    assert code == 0, text
    findings = {one["what"]: one for one in orjson.loads(text)["findings"]}
    assert "8 prompts of the sample have an answer in 'answer'" in findings["verify"]["detail"]
    assert any(name.startswith("gather ") for name in findings)
    code, text = invoke("check", str(path), "--set", "gather.verify.answer=solution")
    assert code != 0
    assert "gather.verify.answer names 'solution', which no row has" in " ".join(text.split())
