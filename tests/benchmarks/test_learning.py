"""The mechanics of the learning experiment on a tiny scale; it says nothing about which arm is better."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning.arms import CPU_ARMS, GPU_ARMS, WEIGHTS, Arm
from benchmarks.learning.experiment import CPU, SMALL, TINY, Experiment, solved
from benchmarks.learning.summary import Estimate, plot, table
from benchmarks.learning.task import ANSWER, STYLES, problems, solution
from grape_service.config.loading import parse_config
from workers.training.trainers.checkpoints import is_whole
from workers.training.trainers.session import Output


def test_solutions_of_every_style_are_right() -> None:
    for problem in problems(200, seed=1):
        assert problem.answer == eval(problem.prompt.removesuffix("="))
        for style in STYLES:
            text = solution(problem, style)
            assert solved(text, problem) == 1
            assert solved(text + "1", problem) == 0
            assert re.findall(ANSWER, text) == [str(problem.answer)]


def test_problems_of_pool_rl_and_test_are_of_their_own() -> None:
    assert len({problem.prompt for problem in problems(500, seed=1)}) == 500
    assert problems(20, seed=1) == problems(20, seed=1) != problems(20, seed=2)


def test_every_arm_has_a_valid_config(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, CPU)
    for arm in [*CPU_ARMS, *GPU_ARMS]:
        config = parse_config(experiment.config(arm, seed=0))
        given = WEIGHTS[arm.weights]
        assert config.select.method == arm.select
        assert (config.weights is None) == (given is None)
        assert (config.behavior is not None) == (given is not None and given["method"] == "pear")
        assert len(config.pool.where) == 1
    assert len({arm.name for arm in CPU_ARMS}) == len(CPU_ARMS) == 21
    assert len({arm.name for arm in GPU_ARMS}) == len(GPU_ARMS) == 10


@pytest.mark.timeout(600)
def test_an_arm_runs_to_its_result_once(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, TINY)
    experiment.prepare()
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == set(TINY.sources)
    assert Experiment(tmp_path, SMALL).size.sources == ("own", "words", "terse")
    arm = Arm("grape", "token")
    result = experiment.run(arm, seed=0)
    for stage in ("after_sft", "after_rl"):
        assert 0 <= result[stage]["accuracy"] <= 1
        assert 0 <= result[stage]["pass_at_8"] <= 1
    assert len(result["rl_rewards"]) == TINY.rl["steps"]
    assert result["grad_norm"] > 0
    assert 0 < result["ess"] <= 1
    for stage in ("sft", "rl"):
        assert is_whole(Output(str(tmp_path / "arms" / "grape+token-0" / stage / "model"), {}).storage)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors"))
    assert experiment.run(arm, seed=0) == result
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors")) == before


def test_table_and_plot_show_means_and_intervals() -> None:
    def result(arm: str, seed: int, sft: float, rl: float) -> dict[str, Any]:
        select, weights = arm.split("+")
        skills = {"after_sft": {"accuracy": sft}, "after_rl": {"accuracy": rl}}
        shared = {"rows": 5, "ess": 0.5, "grad_norm": 1.25, "rl_rewards": [0.1, 0.2]}
        return {"arm": arm, "select": select, "weights": weights, "seed": seed, **skills, **shared}

    results = [result("random+uniform", seed, sft, 0.8) for seed, sft in enumerate((0.4, 0.5, 0.6))]
    results += [result("grape+uniform", seed, sft, 0.9) for seed, sft in enumerate((0.5, 0.6, 0.7))]
    text = table(results, {"target": {"accuracy": 0.25}})
    assert (
        "| grape | uniform | 3 | 5 | 0.50 | 1.25 | 60.0 ± 24.8 | 90.0 ± 0.0 | +10.0 ± 0.0 * | +10.0 ± 0.0 * |" in text
    )
    assert "There are 2 comparisons" in text
    assert str(Estimate.of([0.5])) == "50.0"
    assert Estimate.of([0.1, -0.1]).signed == "+0.0 ± 127.1"
    drawing = plot(results, {"target": {"accuracy": 0.25}})
    assert drawing.count("<circle") == 4
    assert drawing.count("<polyline") == 2
    assert "grape+uniform" in drawing
