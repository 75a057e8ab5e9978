"""Plans against what prepare counts, on a real tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.estimate import survey
from grape_service.estimate.plan import estimate_against_actual, make_plan
from grape_service.estimate.survey import ratio_error, survey_pool
from grape_service.estimate.throughput import TABLE, Measured, interpolate
from grape_service.models.files import resolve_model
from grape_service.pool.listing import list_files
from grape_service.render.loading import load_renderer
from grape_service.storage.storage import Storage
from tests import tiny_models
from tests.jobs import pool_rows, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.make_model(tmp_path_factory.mktemp("model"), arch="llama"))


def _config(folder: Path, model: str, **more: object) -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "pool": {"path": str(folder / "pool")},
            "target": {"model": model, "dtype": "float32"},
            "output": {"path": str(folder / "datasets")},
            **more,
        }
    )


def _truth(config: Config) -> tuple[int, int]:
    """Rows and tokens, rendered one after the other."""
    renderer = load_renderer(resolve_model(config.target).folder, config.target, config.render)
    files = tuple(list_files(config.pool.path, {}))
    found = survey_pool(files, config, renderer, exact=True)
    return int(found.rows), int(found.tokens)


def test_a_small_pool_is_counted_exactly(tmp_path: Path, model: str) -> None:
    rows = [*pool_rows(10), {"prompt": "", "response": "nothing was asked"}]
    write_jsonl(tmp_path / "pool" / "pool.jsonl", rows)
    config = _config(tmp_path, model, behavior={"model": model, "dtype": "float16"}, weights={"method": "pear"})
    plan = make_plan(config, replicas=4, tokens_per_second=100.0, price=3.0)
    assert plan.exact
    assert plan.pool["rows"] == 40
    assert plan.pool["prompts"] == 10
    assert plan.pool["rejected"] == 1
    target, behavior = plan.policies
    assert target.tokens == plan.pool["tokens"]
    assert behavior.rows == 10
    assert plan.gpu_hours == pytest.approx((target.tokens + behavior.tokens) / 100 / 3600)
    assert plan.wall_seconds == pytest.approx(plan.gpu_hours * 3600 / 4)
    assert plan.cost == pytest.approx(3 * plan.gpu_hours)
    against = estimate_against_actual(
        Storage(config.workspace_path),
        config,
        [{"stats": {"tokens": target.tokens, "seconds": 2.0}, "device": "cpu"}],
        int(target.tokens + behavior.tokens),
    )
    assert against is not None
    assert against["tokens_ratio"] == 1.0
    assert against["actual"]["engine_seconds"] == 2.0
    assert plan.race is None
    raced = make_plan(_config(tmp_path, model, score={"race": "exact"}), tokens_per_second=100.0)
    assert raced.race is not None
    assert (raced.race["share"], "is not known" in raced.race["sentence"]) == (None, True)  # nothing has a score yet
    assert raced.policies[0].tokens == target.tokens


def test_windows_are_counted(tmp_path: Path, model: str) -> None:
    rows = [
        {"prompt": f"What is {number}?", "response": "\n\n".join([f"It is {number}."] * steps)}
        for number in range(4)
        for steps in (1, 3, 5)
    ]
    write_jsonl(tmp_path / "pool" / "pool.jsonl", rows)
    config = _config(tmp_path, model, select={"method": "local"})
    target, windows = make_plan(config, tokens_per_second=100.0).policies
    tokenizer = load_renderer(resolve_model(config.target).folder, config.target, config.render).tokenizer
    expected = set()
    for row in rows:
        steps = row["response"].split("\n\n")
        for place, step in enumerate(steps):
            ended = step + ("\n\n" if place < len(steps) - 1 else "<end>")
            before = steps[place - 1] + "\n\n" if place else ""
            expected.add((row["prompt"], before, ended))
    assert windows.rows == len(expected)
    lengths = [
        len(tokenizer(text.removesuffix("<end>"), add_special_tokens=False)["input_ids"]) + text.endswith("<end>")
        for _, before, step in expected
        for text in (before, step)
    ]
    prompts = {row["prompt"]: 0 for row in rows}
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts[prompt] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert windows.tokens == sum(lengths) + sum(prompts[prompt] for prompt, _, _ in expected)
    assert (target.rows, target.role, windows.role) == (12, "target", "target, steps in their windows")


def test_rows_that_the_target_scored_cost_nothing_as_behavior(tmp_path: Path, model: str) -> None:
    write_jsonl(tmp_path / "pool" / "pool.jsonl", pool_rows(10))
    config = _config(tmp_path, model, behavior={"model": model, "dtype": "float32"}, weights={"method": "pear"})
    target, behavior = make_plan(config, tokens_per_second=100.0).policies
    assert (behavior.rows, behavior.reused_rows, behavior.tokens) == (0, 10, 0)
    assert target.rows == 40


def test_a_behavior_is_counted_by_the_rows_of_its_sources(tmp_path: Path, model: str) -> None:
    rows = [{**row, "source": "a" if number % 4 == 0 else "b"} for number, row in enumerate(pool_rows(10))]
    write_jsonl(tmp_path / "pool" / "pool.jsonl", rows)
    one, other = ({"model": model, "dtype": "float32", "system_prompt": words} for words in ("Be brief.", "Be kind."))
    behavior = {"sources": {"a": one, "b": {"column": "logprobs"}, "c": other}}
    config = _config(tmp_path, model, behavior=behavior, weights={"method": "pear"})
    target, of_a, of_c = make_plan(config, tokens_per_second=100.0).policies
    assert (target.rows, of_c.rows, of_c.tokens) == (40, 0, 0)
    assert of_a.rows == pytest.approx(10 / 4)  # 10 of 40 rows are kept, and 10 of 40 are of that source
    assert of_a.tokens == pytest.approx(target.tokens / 16)


def test_a_sample_is_within_its_stated_error(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "PART_BYTES", 2000)
    monkeypatch.setattr(survey, "SAMPLED_PARTS", 12)
    for number in range(3):
        write_jsonl(tmp_path / "pool" / f"p{number}.jsonl", pool_rows(60, start=60 * number))
    config = _config(tmp_path, model)
    rows, tokens = _truth(config)
    renderer = load_renderer(resolve_model(config.target).folder, config.target, config.render)
    files = tuple(list_files(config.pool.path, {}))
    inside = 0
    for seed in range(10):
        found = survey_pool(files, config, renderer, seed=seed)
        assert not found.exact
        assert 0 < found.token_error < 0.2
        assert found.rows == pytest.approx(rows, rel=0.1)
        inside += abs(found.tokens - tokens) <= found.token_error * found.tokens
    assert inside >= 7
    assert "estimated from 12 random parts" in found.how()


def test_a_plan_of_a_sampled_pool_is_written_down(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "PART_BYTES", 2000)
    monkeypatch.setattr(survey, "SAMPLED_PARTS", 4)
    write_jsonl(tmp_path / "pool" / "pool.jsonl", pool_rows(100))
    plan = make_plan(_config(tmp_path, model), tokens_per_second=100.0)
    assert not plan.exact
    assert 0 < plan.pool["prompts"] < 400


def test_the_error_of_a_ratio() -> None:
    sizes = np.array([10.0, 10.0, 10.0, 10.0])
    assert ratio_error(2 * sizes, sizes, 100) == 0.0
    values = np.array([18.0, 22.0, 18.0, 22.0])
    expected = 1.96 * math.sqrt(0.96 * np.var(values, ddof=1) / 4) / 20
    assert ratio_error(values, sizes, 100) == pytest.approx(expected)


def test_throughput_between_and_beyond_measured_sizes() -> None:
    points = [Measured(1e9, 100.0), Measured(4e9, 50.0)]
    assert interpolate(points, 2e9) == pytest.approx(math.sqrt(100 * 50))
    assert interpolate(points, 8e9) == pytest.approx(25)
    assert interpolate(points, 0.5e9) == pytest.approx(200)
    assert interpolate(TABLE["H100", "bfloat16"], 7.6e9) == pytest.approx(59_655)


def test_an_unknown_device_needs_a_figure(tmp_path: Path, model: str) -> None:
    write_jsonl(tmp_path / "pool" / "pool.jsonl", pool_rows(2))
    with pytest.raises(UserError, match="--tokens-per-second"):
        make_plan(_config(tmp_path, model), device="abacus")


def test_a_machine_without_a_gpu_is_never_given_the_time_of_one(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "pool" / "pool.jsonl", pool_rows(2))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = make_plan(_config(tmp_path, model))
    assert plan.policies[0].device == "cpu"
    assert "the table of measured figures, two cores" in plan.policies[0].origin
    cluster = {"ray_address": "http://head:8265"}
    with pytest.raises(UserError, match=r"no earlier manifest tells how fast .* on the cluster at http://head:8265"):
        make_plan(_config(tmp_path, model, workers=cluster))
    assert make_plan(_config(tmp_path, model, workers=cluster), device="H100").policies[0].device == "H100"
