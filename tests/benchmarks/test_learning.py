"""The mechanics of the learning experiment on a tiny scale; it says nothing about which arm is better."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning.arms import CPU_ARMS, GPU_ARMS, WEIGHTS, Arm
from benchmarks.learning.experiment import CPU, SMALL, TINY, Experiment
from benchmarks.learning.run import DOCS, PUBLISHED
from benchmarks.learning.schedule import adopt
from benchmarks.learning.summary import (
    BEGIN,
    END,
    T_975,
    Comparison,
    Estimate,
    clear_ones,
    comparisons,
    plot,
    renew_page,
    table,
    two_sided_p,
    write_raw,
)
from benchmarks.learning.task import ANSWER, STYLES, problems, solution, solved
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
        assert is_whole(Output(str(tmp_path / "arms" / "grape+token-0" / stage / "model"), {}, {}).storage)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors"))
    assert experiment.run(arm, seed=0) == result
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors")) == before


def result(arm: str, seed: int, sft: float, rl: float) -> dict[str, Any]:
    select, weights = arm.split("+")
    skills = {"after_sft": {"accuracy": sft}, "after_rl": {"accuracy": rl}}
    shared = {"rows": 5, "ess": 0.5, "grad_norm": 1.25, "rl_rewards": [0.1, 0.2]}
    return {"arm": arm, "select": select, "weights": weights, "seed": seed, **skills, **shared}


def raw_results() -> dict[str, Any]:
    """Two arms of three seeds: after SFT 10 points apart in each, after RL 5, 10 and 15."""
    results = [result("random+uniform", seed, sft, 0.8) for seed, sft in enumerate((0.4, 0.5, 0.6))]
    after = ((0.5, 0.85), (0.6, 0.9), (0.7, 0.95))
    results += [result("grape+uniform", seed, sft, rl) for seed, (sft, rl) in enumerate(after)]
    return {"size": "tiny", "digest": "d", "start": {"target": {"accuracy": 0.25}}, "pool": {}, "results": results}


def test_table_and_plot_show_means_and_intervals() -> None:
    raw = raw_results()
    text = table(raw)
    # By hand: 0.4, 0.5, 0.6 have a standard deviation of 0.1, and 4.303 * 0.1 / sqrt(3) = 0.248.
    assert "| random | uniform | 3 | 5 | 0.50 | 1.25 | 50.0 ± 24.8 | 80.0 ± 0.6 |" in text
    # Paired, the 10 points of each seed have no spread but that of one problem of 400: 4.303 * 0.25 / sqrt(3) = 0.6;
    # 5, 10, 15 have one of 5: 4.303 * 5 / sqrt(3) = 12.4.
    assert "| grape+uniform | +10.0 ± 0.6 \\*\\* | +10.0 ± 12.4 |  |  |" in text
    assert "there are 2 comparisons" in text
    assert str(Estimate.of([0.5])) == "50.0"
    assert Estimate.of([0.1, -0.1]).signed == "+0.0 ± 127.1"
    drawing = plot(raw["results"], raw["start"])
    assert drawing.count("<circle") == 4
    assert drawing.count("<polyline") == 2
    assert "grape+uniform" in drawing


def test_a_seed_that_an_arm_lacks_is_left_out() -> None:
    raw = raw_results()
    raw["results"] = raw["results"][:5]
    text = table(raw)
    assert "| random | uniform | 2 | 5 | 0.50 | 1.25 | 45.0 ± 63.5 |" in text
    assert "Left out: 1 of a seed that not all arms have yet." in text


def test_p_values_are_those_of_students_t() -> None:
    for number, quantile in T_975.items():
        assert two_sided_p(quantile, number - 1) == pytest.approx(0.05, abs=1e-4)
    assert two_sided_p(-8.61, 4) == pytest.approx(0.001, abs=1e-5)  # of a printed table
    assert two_sided_p(0.0, 3) == 1.0


def test_weights_are_compared_with_the_same_selection_too() -> None:
    arms = ("random+uniform", "grape+uniform", "grape+token", "all+token")
    found = comparisons([result(arm, seed, 0.5, 0.5) for arm in arms for seed in range(3)])
    pairs = list(dict.fromkeys((one.arm, one.other) for one in found))
    assert pairs == [
        ("grape+uniform", "random+uniform"),
        ("grape+token", "random+uniform"),
        ("grape+token", "grape+uniform"),
        ("all+token", "random+uniform"),
    ]
    assert len(found) == 2 * len(pairs)


def test_holms_correction_stops_at_the_first_that_is_not_clear() -> None:
    def one(arm: str, spread: float) -> Comparison:
        return Comparison(arm, "random+uniform", "after_rl", (0.1 - spread, 0.1, 0.1 + spread))

    # t of 1, 2 degrees: mean 0.1 over spread / sqrt(3). p: 0.0013, 0.0202, 0.0315, 0.0742.
    tests = [one("a", 0.00625), one("b", 0.025), one("c", 0.0315), one("d", 0.05)]
    assert [round(test.p, 4) for test in tests] == [0.0013, 0.0202, 0.0315, 0.0742]
    assert clear_ones(tests) == {tests[0]}  # 0.0202 > 0.05 / 3
    assert clear_ones(tests[:2]) == {tests[0], tests[1]}  # 0.0202 <= 0.05 / 1


def test_a_page_gets_its_table_again(tmp_path: Path) -> None:
    page, image = tmp_path / "page.md", tmp_path / "plot.svg"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    raw = raw_results()
    renew_page(raw, page, image)
    assert page.read_text() == f"before\n{BEGIN}\n{table(raw)}{END}\nafter\n"
    assert image.read_text().startswith("<svg")
    renew_page(raw, page, image)
    assert page.read_text().count("random+uniform") == table(raw).count("random+uniform")
    page.write_text("no marks\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        renew_page(raw, page, image)


def test_the_page_has_the_table_and_the_plot_of_the_published_results(tmp_path: Path) -> None:
    page, image = tmp_path / "evidence.md", tmp_path / "evidence.svg"
    page.write_text((DOCS / "evidence.md").read_text())
    renew_page(json.loads(PUBLISHED.read_text()), page, image)
    assert page.read_text() == (DOCS / "evidence.md").read_text()
    assert image.read_text() == (DOCS / "evidence.svg").read_text()
    assert PUBLISHED.stat().st_size < 200_000


def test_published_results_are_taken_where_target_and_pool_are_the_same(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path / "work", TINY)
    (tmp_path / "work/policies/target").mkdir(parents=True)
    for name in ("policies/target/model.safetensors", "pool.jsonl", "rl-prompts.jsonl"):
        (tmp_path / "work" / name).write_text("same")
    (tmp_path / "work/start.json").write_text("{}")
    published = tmp_path / "published.json"
    raw = raw_results()
    write_raw(raw, published)
    assert json.loads(published.read_text()) == raw
    adopt(experiment, "tiny", published)
    assert not (tmp_path / "work/results").exists()  # another digest
    write_raw({**raw, "digest": experiment.digest()}, published)
    adopt(experiment, "tiny", published)
    assert experiment.run(Arm("grape"), seed=2) == raw["results"][5]
