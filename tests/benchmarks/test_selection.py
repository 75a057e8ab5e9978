"""The mechanics of the third learning experiment on a tiny scale; it says nothing about which arm is better."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.learning.chains.measures import EvaluationSizes
from benchmarks.learning.chains.models import Model, Shape, Written, batch_of, log_probs_n
from benchmarks.learning.chains.policies import Recipe, Sizes
from benchmarks.learning.chains.schedule import arm_named
from benchmarks.learning.chains.task import Kind, problems
from benchmarks.learning.chains.training import RlSizes, SftSizes
from benchmarks.learning.selection import pool as pools
from benchmarks.learning.selection import summary
from benchmarks.learning.selection.choosing import kept, read_with_ranks, scores
from benchmarks.learning.selection.pool import PoolSizes, Teacher
from benchmarks.learning.selection.trial import ARMS, PLAN, Plan, Selections

KIND = Kind((2, 3), 0.5)
RECIPE = Recipe({"short": 0.5, "words": 0.5}, KIND, rows=8, steps=2)
POLICIES = Sizes(Shape(hidden=16, layers=1, heads=2), RECIPE, RECIPE, KIND, 0, 0, shortest=1, longest=160, probe=2)
TINY = Plan(
    pool=PoolSizes(POLICIES, (Teacher("family", RECIPE, of_target=True), Teacher("other", RECIPE)), 6, 2, 16, 1),
    sft=SftSizes(batch=4),
    passes=3,
    rl=RlSizes(steps=2, prompts=2, answers=2, max_tokens=12, measure_every=1),
    seeds=(1,),
    rates=(1e-3, 3e-3),
    rl_problems=8,
    tests=EvaluationSizes(problems=4, pass_problems=2, drift_answers=4, max_tokens=12),
)
TEXTS = ("37+8=45;45-5=40;#40", "add 8 to 37: ones 15 leave 5, tens 4, so 45. 45-5=40;#40", "37+8=45;45-5=40;#41", "1")
PROMPTS = ("37+8-5=",) * 4


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Shape(hidden=16, layers=1, heads=2))


def plain_logprobs(model: Model, prefix: str, text: str) -> np.ndarray:
    """log softmax in float64 of each character of `text` after `prefix`."""
    batch = batch_of([prefix], [Written(text, False)])
    logits = model(batch.ids[:, :-1])[batch.mask].double()
    return torch.log_softmax(logits, -1).gather(-1, batch.ids[:, 1:][batch.mask][:, None])[:, 0].detach().numpy()


def test_the_scores_are_those_of_plain_loops(model: Model) -> None:
    cut = [["37+8=45;", "45-5=40;", "#40"], [TEXTS[1][:45], "45-5=40;", "#40"], ["37+8=45;", "45-5=40;", "#41"], ["1"]]
    assert ["".join(steps) for steps in cut] == list(TEXTS)
    whole = [plain_logprobs(model, prompt, text) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    np.testing.assert_allclose(scores("grape", model, PROMPTS, TEXTS), [one.mean() for one in whole], atol=1e-5)
    firsts = [np.cumsum([0, *map(len, steps)])[:-1] for steps in cut]
    expected = [
        np.delete(one, first).mean() if len(one) > 1 else np.nan for one, first in zip(whole, firsts, strict=True)
    ]
    np.testing.assert_allclose(scores("steps", model, PROMPTS, TEXTS), expected, atol=1e-5)
    local = [
        np.mean(
            [
                plain_logprobs(model, prompt + ("" if place == 0 else steps[place - 1]), step).mean()
                for place, step in enumerate(steps)
            ]
        )
        for prompt, steps in zip(PROMPTS, cut, strict=True)
    ]
    np.testing.assert_allclose(scores("local", model, PROMPTS, TEXTS), local, atol=1e-5)
    _, ranks = read_with_ranks(model, PROMPTS, TEXTS)
    lengths = [len(text) for text in TEXTS]
    per_row = np.split(np.minimum(ranks, 100), np.cumsum(lengths)[:-1])
    ratios = [-row.sum() / -one.sum() for row, one in zip(per_row, whole, strict=True)]
    np.testing.assert_allclose(scores("rsr", model, PROMPTS, TEXTS), ratios, rtol=1e-5)
    assert ranks.min() >= 1


def test_of_each_problem_the_best_is_kept(model: Model) -> None:
    rng = np.random.default_rng(0)
    best = scores("grape", model, PROMPTS, TEXTS)
    rows = kept("grape", model, PROMPTS, TEXTS, 2, rng)
    assert rows.tolist() == [int(best[:2].argmax()), 2 + int(best[2:].argmax())]
    assert sorted(kept("all", model, PROMPTS, TEXTS, 2, rng).tolist()) == [0, 1, 2, 3]
    drawn = {tuple(kept("random", model, PROMPTS, TEXTS, 2, rng).tolist()) for _ in range(50)}
    assert drawn == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_log_probabilities_are_those_of_training(model: Model) -> None:
    responses = [Written(text, False) for text in TEXTS]
    found, _ = read_with_ranks(model, PROMPTS, TEXTS)
    np.testing.assert_allclose(found, log_probs_n(model, batch_of(PROMPTS, responses)).detach(), atol=1e-5)


def write_pool(folder: Path) -> None:
    """A pool as the teachers would write it: these models are too small to be right."""
    rows = [(p.start, p.changes, [TEXTS[0], TEXTS[1]]) for p in problems(8, 1, KIND)]
    folder.mkdir(parents=True)
    right = {"family": 0.5, "other": 0.5}
    counts = {"solved_by_all": 8, "asked": 16, "right": right}
    (folder / "selection-pool.json").write_text(json.dumps({"counts": counts, "rows": rows}))


@pytest.mark.timeout(120)
def test_an_arm_gives_the_same_digits_again(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        for seed in (0, 1):
            write_pool(folder / f"seed-{seed}")
        trials = Selections(folder, TINY)
        results = {name: trials.result(arm_named(ARMS, name), 1) for name in ("grape", "grape-again", "all")}
        results["start"] = trials.start(1)
        found.append(json.loads(json.dumps(results), object_hook=without_seconds))
        assert trials.result(arm_named(ARMS, "grape"), 1) == results["grape"]
    assert found[0] == found[1]
    once, again, everything = found[0]["grape"], found[0]["grape-again"], found[0]["all"]
    assert once["kept"][0] == once["kept"][1] == once["kept"][2] == again["kept"][0]
    assert len(everything["kept"]) == len(again["kept"]) == 3
    assert [one["step"] for one in again["rl"]["along"]] == [1, 2]
    assert once["rate"] == min(trials.tried_rates(), key=lambda one: one["held_out"])["rate"]
    assert found[0]["start"]["kept"]["grape"] == once["kept"][0]


def without_seconds(value: dict[str, Any]) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key != "cpu_seconds"}


def test_a_teacher_that_is_never_right_ends_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="all teachers solved 0 problems, and 8 are wanted"):
        pools.make_pool(tmp_path, 0, TINY.pool)
    solvable = replace(TINY.pool, train=0, held_out=0)
    assert pools.make_pool(tmp_path / "none", 0, solvable).problems == []


def made_result(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    along = [{"accuracy": accuracy, "drift": 0.1, "step": 1}, {"accuracy": accuracy + 0.2, "drift": 0.2, "step": 2}]
    kept_rows = [{"shares": {"family-a": 0.5, "other": 0.5}, "tokens": 120.0}] * 3
    skill = {"accuracy": accuracy, "pass_at_8": accuracy}
    rl = {"along": along, "rewards": [0.25] * 30 + [0.5] * 30}
    return {"arm": arm, "seed": seed, "held_out": 0.3, "after_sft": skill, "rl": rl, "kept": kept_rows}


def test_only_whole_seeds_are_compared() -> None:
    results = [
        made_result(name, seed, 0.01 * place + 0.1 * seed)
        for seed in (1, 2)
        for place, name in enumerate(summary.ARM_NAMES)
    ]
    text = summary.tables([], [], results)
    assert "| grape - random | +1.0" in text
    assert "| local - grape | +2.0" in text
    assert "| random | 15.0 ± 63.5 | 35.0 ± 63.5 |" in text
    assert "| 0.3 | 0.2 | +0.250 | 120 | 0.5 |" in text
    assert "Left out: 7 of seeds" in summary.tables([], [], results[:-1])


def test_the_plan_has_the_arms_of_the_table() -> None:
    assert tuple(arm.name for arm in ARMS) == summary.ARM_NAMES
    assert len(PLAN.seeds) == 5


def test_the_page_has_the_tables_of_the_published_results(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs/evidence.md"
    page = tmp_path / "evidence.md"
    page.write_text(docs.read_text())
    summary.renew_page(page)
    assert page.read_text() == docs.read_text()
