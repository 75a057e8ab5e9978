"""The mechanics of the second learning experiment on a tiny scale; it says nothing about which arm is better."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.learning.chains import summary
from benchmarks.learning.chains.calibrate import calibrate
from benchmarks.learning.chains.models import Model, Shape, Written, batch_of, log_probs_n, read, write
from benchmarks.learning.chains.policies import Recipe, Sizes
from benchmarks.learning.chains.schedule import arm_named
from benchmarks.learning.chains.task import FORMS, Kind, Problem, is_right, problems, solution, step_text
from benchmarks.learning.chains.training import RlSizes, Rows, SftSizes, group_advantages, sft
from benchmarks.learning.chains.trial import PLAN, Plan, Trials
from benchmarks.learning.chains.weights import ARMS, TOKEN, ramp, shuffled, weights_of
from grape_service.weigh.pear import pear_weights

KIND = Kind((2, 3), 0.5)
TINY = Plan(
    sizes=Sizes(
        shape=Shape(hidden=16, layers=1, heads=2),
        target=Recipe({"short": 1.0}, KIND, rows=8, steps=3),
        teacher=Recipe({"short": 0.5, "words": 0.5}, KIND, rows=8, steps=3),
        pool=KIND,
        train_rows=12,
        held_out_rows=4,
        shortest=1,
        longest=160,
        probe=2,
    ),
    sft=SftSizes(batch=4),
    rl=RlSizes(steps=2, prompts=2, answers=2, max_tokens=12, measure_every=1),
    seeds=(1,),
    rates=(1e-3, 3e-3),
    rl_problems=8,
    test_problems=4,
    pass_problems=2,
    drift_answers=4,
    shifted=Kind((4,), 0.8),
)


def test_steps_are_right_in_every_form() -> None:
    assert step_text(37, 8, "short") == "37+8=45;"
    assert step_text(37, 8, "columns") == "37+8: 7+8=15, write 5 carry 1, 3+1=4, get 45. "
    assert step_text(2, -8, "columns") == "02-8: 2-8=-6, write 4 carry 1, 0-1=9, get 94. "
    assert step_text(97, 8, "words") == "add 8 to 97: ones 15 leave 5, tens 0, so 05. "
    for state in range(100):
        for change in (*range(-9, 0), *range(1, 10)):
            after = f"{(state + change) % 100:02d}"
            assert all(after in step_text(state, change, form) for form in FORMS)


def test_a_response_is_checked_step_by_step() -> None:
    rng = random.Random(0)
    for problem in problems(50, 1, KIND):
        text = solution(problem, dict.fromkeys(FORMS, 1.0), rng)
        assert is_right(text, problem)
        assert not is_right(text + "1", problem)
    problem = Problem(37, (8, -5))
    assert problem.prompt == "37+8-5="
    assert problem.answer == "40"
    assert is_right("37+8=45;45-5=40;#40", problem)
    for wrong in ("37+8=44;44-5=40;#40", "37+8=45;#40", "37+8=45;45-5=40;#41", "37+8=45;45-5=40;#40 "):
        assert not is_right(wrong, problem)


def test_test_problems_are_of_their_own() -> None:
    trained = {problem.prompt for problem in problems(300, 1, KIND)}
    held_out = {problem.prompt for problem in problems(300, 1, KIND, held_out=True)}
    assert len(trained) == len(held_out) == 300
    assert not trained & held_out


def test_more_problems_than_there_are_is_an_error() -> None:
    assert len(problems(700, 1, Kind((1,), 0.5))) == 700
    with pytest.raises(ValueError, match=r"1000 problems of Kind\(steps=\(1,\).*: 100000 draws gave none beyond 7\d\d"):
        problems(1000, 1, Kind((1,), 0.5))


def test_writing_takes_what_the_whole_forward_pass_says() -> None:
    torch.manual_seed(0)
    model = Model(Shape(hidden=32, layers=2, heads=2))
    prompts = ["37+8=", "40-5+1=", "37+8="]
    written = write(model, prompts, 20, 0.0)
    assert written[0] == written[2]
    for prompt, response in zip(prompts, written, strict=True):
        assert response.length == 20 or response.ended
        batch = batch_of([prompt], [response])
        logits = model(batch.ids[:, :-1])[batch.mask]
        assert torch.equal(logits.argmax(-1), batch.ids[:, 1:][batch.mask])
    together = read(model, prompts, written)
    alone = np.concatenate([read(model, [p], [w]) for p, w in zip(prompts, written, strict=True)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    batch = batch_of(prompts[:1], written[:1])
    expected = torch.log_softmax(model(batch.ids[:, :-1]).double(), -1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    np.testing.assert_allclose(log_probs_n(model, batch).tolist(), expected[batch.mask].tolist(), atol=1e-5)


def test_samples_follow_the_model() -> None:
    torch.manual_seed(0)
    model = Model(Shape(hidden=16, layers=1, heads=2))
    made = write(model, ["1="] * 4000, 1, 1.0, torch.Generator().manual_seed(1))
    probabilities = model(batch_of(["1="], [Written("0", False)]).ids[:, :3])[0, -1].softmax(-1).tolist()
    share = sum(response.text == "7" for response in made) / 4000
    expected = probabilities[batch_of([""], [Written("7", False)]).ids[0, 1]]
    assert share == pytest.approx(expected, abs=4 * (expected / 4000) ** 0.5)


def logprobs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return -rng.random(60), -rng.random(60), np.array([0, 25, 40, 60])


def test_the_weights_of_each_arm() -> None:
    target, behavior, offsets = logprobs()
    weights = {arm.name: weights_of(arm, target, behavior, offsets, seed=3) for arm in ARMS}
    token = pear_weights(target - behavior, offsets, TOKEN).weights
    np.testing.assert_array_equal(weights["token"], token)
    for name in ("uniform", "online", "online-sequence"):
        assert (weights[name] == 1).all()
    for level in ("token", "sequence", "block"):
        np.testing.assert_allclose(weights[f"{level}-dataset"], weights[level] / weights[level].mean())
    np.testing.assert_allclose(weights["probability"], np.exp(target), rtol=1e-6)
    assert not (weights["shuffled"] == token).all()
    for start, stop in itertools.pairwise(offsets):
        np.testing.assert_array_equal(np.sort(weights["shuffled"][start:stop]), np.sort(token[start:stop]))
    assert len({arm.name for arm in ARMS}) == len(ARMS) == 12


def test_a_ramp_holds_the_mean_of_each_place_from_the_end() -> None:
    # Rows of 3 and 2 tokens: the last ones are 4 and 8, those before them 2 and 6, the first has none beside it.
    np.testing.assert_array_equal(ramp(np.array([1.0, 2, 4, 6, 8]), np.array([0, 3, 5])), [1, 4, 6, 4, 6])
    assert sorted(shuffled(np.array([1.0, 2, 4, 6, 8]), np.array([0, 3, 5]), 0)[:3]) == [1, 2, 4]


def test_tokens_of_weight_0_teach_nothing() -> None:
    torch.manual_seed(0)
    model = Model(Shape(hidden=16, layers=1, heads=2))
    before = [parameter.clone() for parameter in model.parameters()]
    zeros = [np.zeros(2)] * 4
    sft(model, Rows(["1="] * 4, [Written("1", True)] * 4, zeros, zeros), None, 1e-2, 0, SftSizes(batch=4))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_answers_are_compared_with_those_of_their_problem() -> None:
    found = group_advantages(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1]), 4)
    # By hand: 1, 0, 0, 1 have a mean of 0.5 and a standard deviation of sqrt(1 / 3); equal rewards say nothing.
    expected = 0.5 / (3**-0.5 + 1e-4)
    np.testing.assert_allclose(found, [expected, -expected, -expected, expected, *[0.0] * 8], rtol=1e-6)


def write_pool(folder: Path) -> None:
    """A pool as the teacher would write it: these models are too small to be right."""
    rng = random.Random(0)
    asked = problems(16, 1, KIND)
    rows = [(p.start, p.changes, solution(p, {"short": 0.5, "words": 0.5}, rng)) for p in asked]
    folder.mkdir(parents=True)
    (folder / "pool.json").write_text(json.dumps({"counts": {"asked": 20, "right": 16}, "rows": rows}))


@pytest.mark.timeout(120)
def test_an_arm_gives_the_same_digits_again(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        for seed in (0, 1):
            write_pool(folder / f"seed-{seed}")
        trials = Trials(folder, TINY)
        results = {arm: trials.result(arm_named(ARMS, arm), 1) for arm in ("uniform", "token", "online")}
        trials.start(1)
        results["start"] = json.loads((folder / "arms/start-1.json").read_text())
        found.append({name: without_seconds(result) for name, result in results.items()})
        assert trials.result(arm_named(ARMS, "uniform"), 1) == json.loads((folder / "arms/uniform-1.json").read_text())
    assert found[0] == found[1]
    token, uniform = found[0]["token"], found[0]["uniform"]
    assert token["held_out"] != uniform["held_out"]
    assert uniform["sft"]["weight"] == 1 != token["sft"]["weight"]
    assert [one["step"] for one in token["rl_shifted"]["along"]] == [1, 2]
    assert len(token["rl_same"]["rewards"]) == 2
    tried = [json.loads(path.read_text()) for path in (tmp_path / "one/rates").glob("token-*.json")]
    assert token["rate"] == min(tried, key=lambda one: one["held_out"])["rate"]
    assert len(tried) == len(TINY.rates)


def test_calibration_looks_at_no_arm(tmp_path: Path) -> None:
    write_pool(tmp_path / "seed-0")
    calibrate(Trials(tmp_path, TINY), rates=(1e-3,), steps=10)
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert set(found) == {"start", "stand_in", "rl_0.001"}
    assert len(found["rl_0.001"]["means_of_ten_steps"]["reward"]) == 1
    assert not (tmp_path / "rates").exists()
    assert [path.name for path in (tmp_path / "arms").iterdir()] == ["start-0.json"]


def without_seconds(result: Any) -> Any:
    if isinstance(result, dict):
        return {key: without_seconds(value) for key, value in result.items() if key != "cpu_seconds"}
    return result


def made_result(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    skill = {"accuracy": accuracy, "pass_at_8": accuracy, "drift": 0.1, "held_out": 0.3}
    along = [{**skill, "step": 1}, {**skill, "accuracy": accuracy + 0.2, "step": 2}]
    rl = {"along": along, "rewards": [0.25] * 30 + [0.5] * 30}
    tasks = {"after_sft": {"same": skill, "shifted": skill}, "rl_same": rl, "rl_shifted": rl}
    sft = {"weight": 1.0, "grad_norm": 0.5, "clipped_steps": 0.125}
    return {"arm": arm, "seed": seed, "rate": 1e-3, "held_out": 1 - accuracy, "sft": sft, **tasks}


def test_only_whole_seeds_are_compared() -> None:
    results = [
        made_result(name, seed, 0.01 * place + 0.1 * seed)
        for seed in (1, 2)
        for place, name in enumerate(summary.ARM_NAMES)
    ]
    text = summary.tables([], [], results)
    # By hand: accuracy of 0.3 at step 0 and 1 and 0.5 at step 2 has an area of (0.3 + 0.4) / 2.
    assert summary.area("same")(made_result("uniform", 1, 0.3)) == pytest.approx(0.35)
    assert "| token - uniform | +1.0 ± 4.5 | **+1.0 ± 4.5** |" in text  # 12.706 * 0.005 / sqrt(2): one test problem
    assert "| sequence - uniform | +2.0" in text
    # Held-out losses of 0.9 and 0.8.
    assert "| uniform | 0.85 | 1 | 0.5 | 0.125 | 0.3 | 0.1 | +0.250 | 0.3 | 0.1 | +0.250 |" in text
    assert "| held-out loss | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text
    assert summary.state(results).startswith("24 of 60 arms and seeds have run, 2 of 5 seeds are whole. Nothing is")
    assert "Left out: 11 of seeds" in summary.tables([], [], results[:-1])
    assert summary.whole_seeds(results[:-1]) == [1]


def test_rank_correlation_is_spearmans() -> None:
    assert summary.rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert summary.rank_correlation([1, 1, 2], [3, 3, 9]) == pytest.approx(1.0)
    assert summary.rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0


def test_the_plan_has_the_arms_and_seeds_of_the_table() -> None:
    assert tuple(arm.name for arm in ARMS) == summary.ARM_NAMES
    assert len(PLAN.seeds) == summary.PLANNED_SEEDS
    assert summary.RESOLUTION * PLAN.test_problems == 1


def test_the_page_has_the_tables_of_the_published_results(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs/evidence.md"
    page = tmp_path / "evidence.md"
    page.write_text(docs.read_text())
    summary.renew_page(page)
    assert page.read_text() == docs.read_text()
    page.write_text("no marks\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        summary.renew_page(page)
