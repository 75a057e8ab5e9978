"""The gate between SFT and RL: figures of the checkpoint in the run's record, and RL only where no rule holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from grape_service.config.gate import GateConfig
from grape_service.config.schema import Config
from grape_service.errors import StageError
from grape_service.release.load import load
from grape_service.rows.keys import in_eval_share
from grape_service.storage.storage import Storage
from tests.jobs import pool_rows, tiny_job
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release
from workers.gate import measure, write_prompts

pytestmark = [pytest.mark.alone, pytest.mark.timeout(1200)]

TRAINER = """
import pathlib, shutil, sys
output, base = sys.argv[1:3]
shutil.copytree(base, pathlib.Path(output) / "model", dirs_exist_ok=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def test_rl_starts_only_where_no_rule_holds(tmp_path: Path, model: str) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    job_of = {"command": [sys.executable, str(script), "{output}", model], "resources": {"cpus": 0.1}}
    gate = {
        "pass_at": [1, 2],
        "samples": 3,
        "max_prompts": 4,
        "sampling": {"max_tokens": 6},
        "verify": {"method": "regex", "pattern": "([a-z])"},
        "stop_if": ["pass@2 < 1.01"],
    }
    train = {"sft": job_of, "rl": job_of, "gate": gate}
    with tiny_job(tmp_path, model, pool_rows(6), train=train) as job:
        stopped = job.grape("run", str(job.config_path), "--json", timeout=600)
        job.config["train"] = {**train, "gate": {**gate, "stop_if": ["pass@2 < 0"]}}
        outcome = job.run(timeout=600)
        reference = outcome["reference"]
        again = job.grape("train", reference, "--config", str(job.config_path), timeout=600)
    assert stopped.returncode == 1
    runs = tmp_path / "datasets" / "tiny" / "runs"
    record = outcome["training"]
    stage = record["stages"]["sft"]
    figures = stage["gate"]
    told = f"gate: pass@2 is {figures['pass@2']:.4g}, and train.gate.stop_if has 'pass@2 < 1.01': RL is not started on "
    assert told + stage["checkpoint"] in stopped.stderr
    assert (figures["prompts"], figures["samples"], figures["unknown"]) == (4, 12, 0)
    assert 0 <= figures["pass@1"] <= figures["pass@2"] <= 1
    # The figures are those of the samples that lie in the workspace.
    import pyarrow.parquet as pq

    files = (tmp_path / "datasets" / ".grape" / "gathered" / "pools").glob("gate-*/*.parquet")
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert figures["pass@1"] == pytest.approx(sum(row["verdict"] == "right" for row in rows) / 12)
    assert len({row["prompt_id"] for row in rows}) == 4
    assert record["stages"]["rl"]["state"] == "succeeded"
    assert json.loads((runs / f"{stage['run']}.json").read_text())["stages"]["sft"]["gate"] == figures
    assert again.returncode == 0, again.stderr
    assert f"pass@2 {figures['pass@2']:.4g}" in again.stdout


def config_of(**gate: Any) -> Config:
    return Config.model_validate(
        {
            "name": "x",
            "pool": {"path": "pool"},
            "target": {"model": "team/m"},
            "output": {"path": "out"},
            "train": {"sft": {"eval_share": 0.5}, "gate": gate},
        }
    )


def no_samples(config: Config) -> Any:
    raise AssertionError("a gate that needs no samples samples nothing")


def test_the_held_out_loss_is_that_of_sft(tmp_path: Path) -> None:
    config = config_of(held_out_loss=True, stop_if=["held_out_loss > 2.5"])
    assert config.train is not None
    gate = config.train.gate
    assert gate is not None
    release = load(write_release(tmp_path, make_rows(3), {}))
    stage = {"metrics": {"eval_loss": 2.75, "last": {"loss": 1.0}}, "checkpoint": "c"}
    figures = measure(config, gate, release, stage, no_samples)
    assert figures == {"held_out_loss": 2.75}
    assert gate.refusals(figures) == ["held_out_loss is 2.75, and train.gate.stop_if has 'held_out_loss > 2.5'"]
    assert gate.refusals({"held_out_loss": 2.5}) == []
    with pytest.raises(StageError, match="SFT kept no prompt back"):
        measure(config, gate, release, {"metrics": {}, "checkpoint": "c"}, no_samples)


def test_prompts_are_those_that_sft_kept_back(tmp_path: Path) -> None:
    release = load(write_release(tmp_path / "out", make_rows(40), {}))
    config = config_of(pass_at=[1], verify={"method": "exact", "answer": "answer"}, max_prompts=5)
    assert config.train is not None
    gate = config.train.gate
    assert gate is not None
    workspace = Storage(str(tmp_path / "workspace"))
    pool = write_prompts(config, gate, release, workspace)
    assert isinstance(pool.path, str)
    rows = [json.loads(line) for line in Path(pool.path).read_text().splitlines()]
    assert len(rows) == 5
    assert all(in_eval_share(row["prompt_id"], 0.5) for row in rows)
    for row in rows:
        number = int(row["prompt_id"].removeprefix("prompt-"))
        assert (row["prompt"], row["answer"]) == ([{"role": "user", "content": f"{number}?"}], str(number + 1))
    assert "answer" in pool.carry
    everything = gate.model_copy(update={"max_prompts": 100})
    pool = write_prompts(config, everything, release, workspace)
    held_out = [f"prompt-{number}" for number in range(40) if in_eval_share(f"prompt-{number}", 0.5)]
    assert isinstance(pool.path, str)
    assert sorted(json.loads(line)["prompt_id"] for line in Path(pool.path).read_text().splitlines()) == sorted(
        held_out
    )


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        ({}, "a gate measures something"),
        ({"pass_at": [0]}, "k counts samples from 1"),
        ({"pass_at": [8], "samples": 4}, "pass@8 needs 8 samples"),
        ({"held_out_loss": True, "stop_if": ["loss > 3"]}, "is no rule"),
        ({"held_out_loss": True, "stop_if": ["pass@8 < 1"]}, "that is not measured: those are held_out_loss"),
        ({"pass_at": [1]}, "give train.gate.verify, or gather.verify"),
    ],
)
def test_a_gate_that_cannot_be_asked_is_refused(gate: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config_of(**gate)


def test_held_out_loss_needs_prompts_that_are_kept_back() -> None:
    with pytest.raises(ValueError, match=r"set sft\.eval_share"):
        Config.model_validate(
            {**config_of(held_out_loss=True).model_dump(), "train": {"sft": {}, "gate": {"held_out_loss": True}}}
        )
    assert GateConfig(pass_at=[8, 1, 8]).pass_at == [1, 8]
    assert GateConfig(pass_at=[8]).num_samples == 16
