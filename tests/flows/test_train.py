"""A real tiny SFT and GRPO, as Prefect tasks that start real Ray jobs on a private Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.train import train
from grape_service.config import TrainConfig
from grape_service.storage import Storage
from tests.tiny_models import make_model
from tests.workers.trainers.tiny_release import make_rows, write_release
from workers.trainers.records import RunRecords, lineage


@pytest.mark.timeout(600)
def test_sft_and_rl_through_a_flow_end_with_two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = make_model(tmp_path / "model")
    reference = write_release(tmp_path / "out", make_rows(8), {"target": {"model": model}})
    config = TrainConfig(
        sft={"batch_size": 4, "device": "cpu", "save_steps": 1},
        rl={
            "steps": 1,
            "prompts_per_step": 2,
            "num_generations": 2,
            "max_response_tokens": 4,
            "device": "cpu",
            "rewards": [{"type": "exact"}],
        },
    )
    with prefect_test_harness(server_startup_timeout=120):
        record = train(reference, config)
    assert record["state"] == "succeeded"
    stages = record["stages"]
    assert [stages[stage]["attempt"] for stage in ("sft", "rl")] == [1, 1]
    assert stages["sft"]["metrics"]["last"]["loss"] > 0
    assert 0 <= stages["rl"]["metrics"]["last"]["reward"] <= 1
    for stage in ("sft", "rl"):
        assert (Path(stages[stage]["checkpoint"]) / "model.safetensors").exists()

    origin = lineage(stages["rl"]["checkpoint"])
    assert origin["checkpoint"]["model"] == stages["sft"]["checkpoint"]
    assert origin["dataset"] == reference
    assert origin["run"]["id"] == record["id"]
    assert RunRecords(Storage(str(tmp_path / "out")), "tiny").ids() == [record["id"]]
